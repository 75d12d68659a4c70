"""What the optimizer's side of a step costs the host: ``python -m benches.host_time``.

The tensors have ten elements each, so nearly all of the time is Python's and the binding's. Hot: one step after the
other, with everything in the processor's caches. Between passes: with a forward and a backward pass of a real network
before each of a step's two calls, as in training, where these have filled the caches with something else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sam_optim import SAM

TENSORS = (1, 161)  # 161 is ResNet-50's
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {}),
}


class Microseconds(NamedTuple):
    """Of a step's calls together: the median, and a tenth of all steps are faster than this."""

    median: float
    fast: float


def of_steps(call: Callable[[], float], steps: int) -> Microseconds:
    """Seconds of so many steps, as ``call`` has measured them, without the first fifth."""
    times = sorted([call() * 1e6 for _ in range(steps)][steps // 5 :])
    return Microseconds(statistics.median(times), times[len(times) // 10])


def optimizer_of(base: str, tensors: int) -> SAM:
    cls, settings = BASES[base]
    params = [nn.Parameter(torch.randn(10)) for _ in range(tensors)]
    return SAM(params, cls, rho=0.05, lr=1e-6, **settings)


def make_step(optimizer: SAM, gradients: list[Tensor], before: Callable[[], object]) -> float:
    """Seconds of ``first_step()`` and ``second_step()``."""
    params, spent = optimizer.param_groups[0]["params"], 0.0
    for move in (optimizer.first_step, optimizer.second_step):
        before()
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        start = time.perf_counter()
        move()
        spent += time.perf_counter() - start
    return spent


def network_pass() -> Callable[[], object]:
    """A forward and a backward pass over weights and activations of some 20 MB."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Linear(512, 10)), torch.randn(256, 512)

    def run() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return run


def measure(base: str, tensors: int, is_hot: bool, steps: int) -> Microseconds:
    optimizer = optimizer_of(base, tensors)
    gradients = [torch.randn(10) for _ in range(tensors)]
    before = (lambda: None) if is_hot else network_pass()
    return of_steps(lambda: make_step(optimizer, gradients, before), steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="hot ones; a tenth of them between passes")
    steps = parser.parse_args().steps
    print("median (a tenth is faster than), in microseconds")
    for base in BASES:
        for tensors in TENSORS:
            hot = measure(base, tensors, True, steps)
            cold = measure(base, tensors, False, max(5, steps // 10))
            print(
                f"SAM with {base}, {tensors} tensors: hot {hot.median:.0f} ({hot.fast:.0f}), "
                f"between passes {cold.median:.0f} ({cold.fast:.0f})"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
