"""Who makes a step on a GPU: ours in each way that it can be launched, and its peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sam_kernels import cuda, triton

from ..contenders import BASES, CONTENDERS, RHO, ForeachMasters
from ..shapes import Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Weights and gradients in bfloat16, with masters in float32.
WITH_MASTERS = "bfloat16, masters"
ALL_DTYPES = (*DTYPES, WITH_MASTERS)


@dataclass(frozen=True)
class Form:
    """A way to make a step.

    Attributes:
        contender: its name in ``CONTENDERS``, or "foreach masters".
        backend: of ours.
        tuning: how that launches.
        dtypes: that it knows.
        compiled: by ``torch.compile``, which takes a minute for each list of tensors.
    """

    contender: str
    backend: Any = None
    tuning: Any = None
    dtypes: Sequence[str] = tuple(DTYPES)
    compiled: bool = False

    @property
    def is_ours(self) -> bool:
        return self.contender == "sam-kernels"

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here. On a CPU ours runs by the backend that is chosen there."""
        if self.contender == "pytorch-optimizer" and importlib.util.find_spec("pytorch_optimizer") is None:
            return "pytorch-optimizer is not installed"
        on_gpu = self.backend is not None and device.type == "cuda"
        return self.backend.unavailable_reason() if on_gpu else None

    def step(self, parameters: list[Tensor], base: str, dtype: str, **changes: Any) -> Callable[[], object]:
        """The optimizer side of a step: both moves."""
        cls, settings = BASES[base]
        settings = {**settings, **changes}
        if self.is_ours:
            settings |= {"master_weights": True} if dtype == WITH_MASTERS else {}
            if self.backend is not None and parameters[0].is_cuda:
                settings["backend"] = self.backend.name
        if self.contender == "foreach masters":
            optimizer: Any = ForeachMasters(parameters, cls, RHO, **settings)
        else:
            optimizer = CONTENDERS[self.contender](parameters, cls, RHO, False, **settings)
        if self.compiled:
            optimizer.first_step = torch.compile(optimizer.first_step)

        def step() -> None:
            optimizer.first_step()
            optimizer.second_step()

        return step

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Within it, the backend launches so."""
        if self.backend is None:
            yield
            return
        before = self.backend.tuning
        self.backend.tuning = self.tuning
        try:
            yield
        finally:
            self.backend.tuning = before


FORMS = {
    "sam-kernels": Form("sam-kernels", cuda.backend, cuda.Tuning(), ALL_DTYPES),
    "sam-kernels, two launches": Form("sam-kernels", cuda.backend, cuda.Tuning(one_launch=False), ALL_DTYPES),
    "sam-kernels, Triton": Form("sam-kernels", triton.backend, triton.Tuning(), ALL_DTYPES),
    "sam-kernels, Triton, one launch": Form("sam-kernels", triton.backend, triton.Tuning(one_launch=True), ALL_DTYPES),
    "foreach SAM": Form("foreach SAM"),
    "foreach masters": Form("foreach masters", dtypes=(WITH_MASTERS,)),
    "per-tensor SAM": Form("per-tensor SAM"),
    "pytorch-optimizer": Form("pytorch-optimizer"),
    "compiled SAM": Form("foreach SAM", dtypes=("float32",), compiled=True),
}


def make_parameters(shapes: list[Shape], dtype: str, device: torch.device) -> list[Tensor]:
    """Random parameters with random gradients; the same on every call."""
    stored = DTYPES.get(dtype, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=generator, device=device).to(stored)) for s in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, device=device).to(stored)
    return parameters
