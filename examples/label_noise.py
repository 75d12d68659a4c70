"""SGD, SAM, Agnostic-SAM, Align-SAM, SAMPa and SAM's family on digits with random training labels.

For each method rho is chosen on a part of the training set that was held out, with its wrong labels; the test set is
looked at once, with the chosen rho and fresh seeds. Run it: ``python examples/label_noise.py`` (some minutes), or for
other methods ``python examples/label_noise.py --noise 0.6 --methods GSAM Momentum-SAM ...``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from sam_optim import (
    AESAM,
    CRSAM,
    GSAM,
    SAM,
    WSAM,
    AgnosticSAM,
    FriendlySAM,
    IntervalSAM,
    LookSAM,
    MomentumSAM,
    SAMPa,
    StableSAM,
    UnifiedSAM,
    VaSSO,
)
from sam_optim.quickstart import Data, load_digits, make_model

METHODS: dict[str, Any] = {
    "SGD": None,
    "SAM": SAM,
    "SAMPa": SAMPa,
    "Align-SAM": lambda *args, **kwargs: AgnosticSAM(*args, variant="align", **kwargs),
    "Agnostic-SAM": AgnosticSAM,
}
FAMILY: dict[str, Any] = {
    "Momentum-SAM": MomentumSAM,
    "LookSAM": LookSAM,
    "SAM every 2nd step": IntervalSAM,
    "AE-SAM": AESAM,
    "GSAM": GSAM,
    "WSAM": WSAM,
    "Friendly SAM": FriendlySAM,
    "Stable SAM": StableSAM,
    "Unified SAM": UnifiedSAM,
    "VaSSO": VaSSO,
    "CR-SAM": CRSAM,
}
RHOS = (0.05, 0.1, 0.2, 0.4, 0.8)
# Momentum-SAM perturbs along -v, where the loss falls at first, and wants larger radii.
MOMENTUM_RHOS = (0.2, 0.4, 0.8, 1.6, 3.2)
ALL = {**METHODS, **FAMILY}
BATCH, LR, MOMENTUM = 64, 0.05, 0.9


class Run(NamedTuple):
    """Accuracy on the test set in percent, seconds a step, and gradients a step."""

    accuracy: float
    seconds: float
    gradients: float


def train(name: str, rho: float, train_set: Data, test_set: Data, epochs: int, seed: int) -> Run:
    torch.manual_seed(seed)
    model = make_model()
    settings = {"lr": LR, "momentum": MOMENTUM}
    optimizer: Any
    if ALL[name] is None:
        optimizer = torch.optim.SGD(model.parameters(), **settings)
    else:
        optimizer = ALL[name](model.parameters(), torch.optim.SGD, rho, **settings)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    images, labels = train_set
    previous = torch.empty(0, dtype=torch.long)
    steps, gradients, start = 0, 0, time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH):
            indices = {"train": batch, "previous": previous, "validation": torch.randint(len(labels), (BATCH // 4,))}
            if ALL[name] is None:
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                gradients += 1
                optimizer.step()
                optimizer.zero_grad()
            else:
                for p in optimizer.each_pass():
                    chosen = indices[p.data]
                    nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                    gradients += 1
            previous = batch
            steps += 1
        scheduler.step()
    seconds = (time.perf_counter() - start) / steps
    with torch.no_grad():
        correct = model(test_set[0]).argmax(1) == test_set[1]
    return Run(100.0 * correct.float().mean().item(), seconds, gradients / steps)


def choose_rho(name: str, noise: float, epochs: int, seeds: int) -> float:
    """The rho with the best mean accuracy on a held-out third of the noisy training set."""
    if ALL[name] is None:
        return 0.0
    radii = MOMENTUM_RHOS if name == "Momentum-SAM" else RHOS
    scores = dict.fromkeys(radii, 0.0)
    for seed in range(1000, 1000 + seeds):
        (images, labels), _ = load_digits(noise, seed)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        held_out, kept = order[: len(order) // 3], order[len(order) // 3 :]
        for rho in radii:
            sets = (images[kept], labels[kept]), (images[held_out], labels[held_out])
            scores[rho] += train(name, rho, *sets, epochs, seed).accuracy
    return max(radii, key=lambda rho: scores[rho])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.6, 0.8])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5, help="for the test accuracies")
    parser.add_argument("--tuning-seeds", type=int, default=5, help="for the choice of rho")
    parser.add_argument("--methods", nargs="+", choices=list(ALL), default=list(METHODS), metavar="METHOD")
    options = parser.parse_args()
    for noise in options.noise:
        table = Table(title=f"{100 * noise:.0f} % random labels, {options.seeds} seeds, {options.epochs} epochs")
        for column in ("", "rho", "test accuracy", "gradients a step", "time a step"):
            table.add_column(column, justify="left" if not column else "right")
        for name in track(options.methods, description=f"noise {noise}"):
            rho = choose_rho(name, noise, options.epochs, options.tuning_seeds)
            results = [
                train(name, rho, *load_digits(noise, seed), options.epochs, seed) for seed in range(options.seeds)
            ]
            accuracies = [run.accuracy for run in results]
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            seconds = statistics.median(run.seconds for run in results)
            row = (
                f"{statistics.mean(accuracies):.1f} ± {spread:.1f} %",
                f"{results[0].gradients:.2g}",
                f"{1e6 * seconds:.0f} µs",
            )
            table.add_row(name, f"{rho or ''}", *row)
        Console().print(table)


if __name__ == "__main__":
    main()
