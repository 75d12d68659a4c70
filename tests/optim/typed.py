"""What type checkers have to accept and to refuse. Nothing of it runs: mypy reads it, unused ignores included."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import nn

from sam_optim import (
    AESAM,
    ASAM,
    CRSAM,
    GNP,
    GSAM,
    MGSERSAM,
    SAM,
    USAM,
    WSAM,
    AgnosticSAM,
    AlignSAM,
    FriendlySAM,
    IntervalSAM,
    LookSAM,
    MomentumSAM,
    RandomizedSAM,
    SAMPa,
    StableSAM,
    UnifiedSAM,
    VaSSO,
    m_sam,
    sam_on,
)


def settings_are_typed(model: nn.Module, sgd: type[torch.optim.SGD]) -> None:
    params = model.parameters()
    SAM(params, sgd, lr=0.1, closure_runs="every_pass", backend="cpu", adaptive="weights", rho=torch.tensor(0.1))
    SAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    SAM(params, sgd, backend=3)  # type: ignore[arg-type]
    ASAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    ASAM(params, sgd, backend=3)  # type: ignore[arg-type]
    GSAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    GSAM(params, sgd, backend=3)  # type: ignore[arg-type]
    StableSAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    StableSAM(params, sgd, backend=3)  # type: ignore[arg-type]
    WSAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    WSAM(params, sgd, backend=3)  # type: ignore[arg-type]
    FriendlySAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    FriendlySAM(params, sgd, backend=3)  # type: ignore[arg-type]
    CRSAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    CRSAM(params, sgd, backend=3)  # type: ignore[arg-type]
    LookSAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    LookSAM(params, sgd, backend=3)  # type: ignore[arg-type]
    UnifiedSAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    UnifiedSAM(params, sgd, backend=3)  # type: ignore[arg-type]
    VaSSO(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    VaSSO(params, sgd, backend=3)  # type: ignore[arg-type]
    MomentumSAM(params, sgd, 0.1, closure_runs="twice")  # type: ignore[arg-type]
    MomentumSAM(params, sgd, 0.1, backend=3)  # type: ignore[arg-type]
    IntervalSAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    IntervalSAM(params, sgd, backend=3)  # type: ignore[arg-type]
    RandomizedSAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    RandomizedSAM(params, sgd, backend=3)  # type: ignore[arg-type]
    AESAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    AESAM(params, sgd, backend=3)  # type: ignore[arg-type]
    AgnosticSAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    AgnosticSAM(params, sgd, backend=3)  # type: ignore[arg-type]
    SAMPa(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    SAMPa(params, sgd, backend=3)  # type: ignore[arg-type]
    MGSERSAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    MGSERSAM(params, sgd, backend=3)  # type: ignore[arg-type]
    GNP(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    GNP(params, sgd, backend=3)  # type: ignore[arg-type]
    USAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    USAM(params, sgd, backend=3)  # type: ignore[arg-type]
    AlignSAM(params, sgd, closure_runs="twice")  # type: ignore[arg-type]
    AlignSAM(params, sgd, backend=3)  # type: ignore[arg-type]
    SAM(params, sgd, adaptive="weight")  # type: ignore[arg-type]
    SAM(params, sgd, master_weights="yes")  # type: ignore[arg-type]
    SAM(params, sgd, counts_in_norm=True)  # type: ignore[arg-type]
    SAMPa(params, sgd, warm_start="hot")  # type: ignore[arg-type]
    AgnosticSAM(params, sgd, variant="aligned")  # type: ignore[arg-type]


def settings_can_be_read_and_written(model: nn.Module, sgd: type[torch.optim.SGD]) -> None:
    params = model.parameters()
    optimizer = GSAM(params, sgd, alpha=0.5)
    assert_type(optimizer.alpha, float)
    assert_type(optimizer.rho, float | torch.Tensor)
    assert_type(optimizer.eta, float | None)
    assert_type(LookSAM(params, sgd).k, int)
    assert_type(USAM(params, sgd).k, float)
    assert_type(WSAM(params, sgd).decouple, bool)
    assert_type(AlignSAM(params, sgd).variant, str)
    optimizer.alpha = 0.25
    optimizer.alpha = torch.tensor(0.25)
    optimizer.alpha = "large"  # type: ignore[assignment]
    optimizer.rho = torch.tensor(0.1)
    optimizer.eta = None
    assert_type(optimizer.setting_names(), list[str])
    GSAM(params, sgd, **optimizer.settings(), lr=0.1)
    MomentumSAM(params, sgd, lr=0.1, momentum=0.9)
    AgnosticSAM(params, sgd, rho=0.1)
    AgnosticSAM(params, sgd, rho_train=0.1)
    assert_type(sam_on(model, sgd, lr=0.1), SAM)
    m_sam(model, optimizer, lambda model, batch: model(batch), m=4)


def steps_are_those_of_torch(optimizer: SAM) -> None:
    optimizer.step()
    assert_type(optimizer.step(lambda: 0.5), float)
    assert_type(optimizer.step(lambda: torch.ones(()), closure_runs="every_pass"), torch.Tensor)
    optimizer.step(lambda: 0.5, closure_runs="twice")  # type: ignore[call-overload]
    torch_optimizer: torch.optim.Optimizer = optimizer
    assert_type(torch_optimizer.step(lambda: 0.5), float)
    optimizer.defaults["lr"] = 0.5
