"""Whole training steps of small networks: what a user wins end to end, and what share the optimizer has."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sam_optim import SAM, AgnosticSAM, SAMPa, TrainStep
from sam_optim.per_tensor import PerTensorSAM

from .contenders import BASES, RHO, THREADS
from .networks import loss_of, make
from .recording import CLOCK, record

NETWORKS = {"ResNet": ("SGD momentum", 32), "ViT": ("AdamW", 32), "GPT": ("AdamW", 8)}
CONTENDERS = [
    "one pass alone",
    "two passes alone",
    "base optimizer",
    "per-tensor SAM",
    "sam-kernels",
    "sam-kernels, TrainStep",
    "sam-kernels, SAMPa",
    "sam-kernels, Agnostic-SAM",
]
# What a contender's passes alone would take, by the number of its passes over a whole batch.
PASSES_OF = {
    "base optimizer": "one pass alone",
    "per-tensor SAM": "two passes alone",
    "sam-kernels": "two passes alone",
    "sam-kernels, TrainStep": "two passes alone",
    "sam-kernels, SAMPa": "two passes alone",
}
ROUNDS = 14
_TIMES: dict[str, dict[str, list[float]]] = {}


def optimizer_share(times: dict[str, list[float]], contender: str) -> float | None:
    """What the optimizer takes of a step: the median over rounds, each compared with the passes of the same round."""
    if contender not in PASSES_OF:
        return None
    pairs = zip(times[PASSES_OF[contender]], times[contender], strict=True)
    return statistics.median(1.0 - passes / step for passes, step in pairs)


def training_call(contender: str, network: str) -> Callable[[], object]:
    """One training step, ready to be made again and again."""
    torch.set_num_threads(THREADS)
    base_name, batch_size = NETWORKS[network]
    model, batch, _ = make(network, batch_size)
    base, settings = BASES[base_name]
    params = model.parameters()

    def passes(count: int) -> None:
        for _ in range(count):
            model.zero_grad()
            loss_of(model, batch).backward()

    if contender == "one pass alone":
        return lambda: passes(1)
    if contender == "two passes alone":
        return lambda: passes(2)
    if contender == "base optimizer":
        plain = base(params, fused=True, **settings)

        def plain_step() -> None:
            passes(1)
            plain.step()

        return plain_step
    if contender in ("per-tensor SAM", "sam-kernels"):
        optimizer: Any = (SAM if contender == "sam-kernels" else PerTensorSAM)(params, base, RHO, **settings)

        def step_by_hand() -> None:
            passes(1)
            optimizer.first_step()
            passes(1)
            optimizer.second_step()

        return step_by_hand
    if contender == "sam-kernels, SAMPa":
        step = TrainStep(model, SAMPa(params, base, RHO, **settings), loss_of)
    elif contender == "sam-kernels, Agnostic-SAM":
        step = TrainStep(model, AgnosticSAM(params, base, RHO, **settings), loss_of, validation=0.25)
    else:
        step = TrainStep(model, SAM(params, base, RHO, **settings), loss_of)
    return lambda: step(batch)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
def test_training(benchmark, processes, network, contender):
    if network not in _TIMES:
        calls: dict[str, Any] = {f"{name} ": (training_call, (name, network)) for name in CONTENDERS}
        timed = processes.interleaved(calls, ROUNDS, 1)
        _TIMES[network] = {name.strip(): times for name, times in timed.items()}
    base, batch_size = NETWORKS[network]
    model, _, samples = make(network, batch_size)
    record(
        benchmark,
        _TIMES[network],
        contender,
        f"{network}, {base}",
        training=network,
        base=base,
        parameters=sum(p.numel() for p in model.parameters()),
        tensors=len(list(model.parameters())),
        samples=samples,
        unit="tokens" if network == "GPT" else "images",
        optimizer_share=optimizer_share(_TIMES[network], contender),
    )
