"""Whole training steps of small networks: what a user wins end to end, and what share the optimizer has."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from examples.per_tensor_sam import PerTensorSAM
from sam_optim import SAM, AgnosticSAM, SAMPa, TrainStep

from .contenders import BASES, RHO, THREADS
from .networks import loss_of, make
from .recording import CLOCK, record

NETWORKS = {"ResNet": ("SGD momentum", 32), "ViT": ("AdamW", 32), "GPT": ("AdamW", 8)}
CONTENDERS = [
    "base optimizer",
    "per-tensor SAM",
    "sam-kernels",
    "sam-kernels, TrainStep",
    "sam-kernels, SAMPa",
    "sam-kernels, Agnostic-SAM",
]
# Those whose optimizer calls can be timed by themselves.
BY_HAND = ("base optimizer", "per-tensor SAM", "sam-kernels")
ROUNDS = 14
_TIMES: dict[str, dict[str, list[float]]] = {}
_SHARES: dict[str, dict[str, float]] = {}


def pass_and_moves(contender: str, network: str) -> tuple[Callable[[], None], list[Callable[[], object]]]:
    """Forward and backward, and the optimizer's calls, one after each pass."""
    torch.set_num_threads(THREADS)
    base_name, batch_size = NETWORKS[network]
    model, batch, _ = make(network, batch_size)
    base, settings = BASES[base_name]

    def run_pass() -> None:
        model.zero_grad()
        loss_of(model, batch).backward()

    if contender == "base optimizer":
        return run_pass, [base(model.parameters(), fused=True, **settings).step]
    cls = SAM if contender == "sam-kernels" else PerTensorSAM
    optimizer: Any = cls(model.parameters(), base, RHO, **settings)
    return run_pass, [optimizer.first_step, optimizer.second_step]


def optimizer_shares(network: str) -> dict[str, float]:
    """What the optimizer's calls take of a step: medians over steps that the contenders make in turn."""
    parts = {name: pass_and_moves(name, network) for name in BY_HAND}
    shares: dict[str, list[float]] = {name: [] for name in BY_HAND}
    for number in range(ROUNDS + 2):
        for name, (run_pass, moves) in parts.items():
            in_optimizer, start = 0.0, time.perf_counter()
            for move in moves:
                run_pass()
                before = time.perf_counter()
                move()
                in_optimizer += time.perf_counter() - before
            if number >= 2:
                shares[name].append(in_optimizer / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in shares.items()}


def training_call(contender: str, network: str) -> Callable[[], object]:
    """One training step, ready to be made again and again."""
    if contender in BY_HAND:
        run_pass, moves = pass_and_moves(contender, network)

        def step_by_hand() -> None:
            for move in moves:
                run_pass()
                move()

        return step_by_hand
    torch.set_num_threads(THREADS)
    base_name, batch_size = NETWORKS[network]
    model, batch, _ = make(network, batch_size)
    base, settings = BASES[base_name]
    params = model.parameters()
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
        timed = processes.interleaved(calls, ROUNDS)
        _TIMES[network] = {name.strip(): times for name, times in timed.items()}
        _SHARES[network] = optimizer_shares(network)
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
        optimizer_share=_SHARES[network].get(contender),
    )
