"""SGD, SAM, Agnostic-SAM, Align-SAM and SAMPa on digits with 60 % and 80 % random training labels.

For each method rho is chosen on a part of the training set that was held out, with its wrong labels; the test set is
looked at once, with the chosen rho and fresh seeds. Run it: ``python examples/label_noise.py`` (some minutes).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from sam_optim import SAM, AgnosticSAM, SAMPa
from sam_optim.quickstart import Data, load_digits, make_model

METHODS: dict[str, Any] = {
    "SGD": None,
    "SAM": SAM,
    "SAMPa": SAMPa,
    "Align-SAM": lambda *args, **kwargs: AgnosticSAM(*args, variant="align", **kwargs),
    "Agnostic-SAM": AgnosticSAM,
}
GRADIENTS = {"SGD": 1, "SAM": 2, "SAMPa": 2, "Align-SAM": 3, "Agnostic-SAM": 4}
RHOS = (0.05, 0.1, 0.2, 0.4, 0.8)
BATCH, LR, MOMENTUM = 64, 0.05, 0.9


def train(name: str, rho: float, train_set: Data, test_set: Data, epochs: int, seed: int) -> tuple[float, float]:
    """Accuracy on the test set in percent, and seconds a step."""
    torch.manual_seed(seed)
    model = make_model()
    settings = {"lr": LR, "momentum": MOMENTUM}
    optimizer: Any
    if METHODS[name] is None:
        optimizer = torch.optim.SGD(model.parameters(), **settings)
    else:
        optimizer = METHODS[name](model.parameters(), torch.optim.SGD, rho, **settings)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    images, labels = train_set
    previous = torch.empty(0, dtype=torch.long)
    steps, start = 0, time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH):
            indices = {"train": batch, "previous": previous, "validation": torch.randint(len(labels), (BATCH // 4,))}
            if METHODS[name] is None:
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                for p in optimizer.each_pass():
                    chosen = indices[p.data]
                    nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            previous = batch
            steps += 1
        scheduler.step()
    seconds = (time.perf_counter() - start) / steps
    with torch.no_grad():
        correct = model(test_set[0]).argmax(1) == test_set[1]
    return 100.0 * correct.float().mean().item(), seconds


def choose_rho(name: str, noise: float, epochs: int, seeds: int) -> float:
    """The rho with the best mean accuracy on a held-out third of the noisy training set."""
    if METHODS[name] is None:
        return 0.0
    scores = dict.fromkeys(RHOS, 0.0)
    for seed in range(1000, 1000 + seeds):
        (images, labels), _ = load_digits(noise, seed)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        held_out, kept = order[: len(order) // 3], order[len(order) // 3 :]
        for rho in RHOS:
            sets = (images[kept], labels[kept]), (images[held_out], labels[held_out])
            scores[rho] += train(name, rho, *sets, epochs, seed)[0]
    return max(RHOS, key=lambda rho: scores[rho])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.6, 0.8])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5, help="for the test accuracies")
    parser.add_argument("--tuning-seeds", type=int, default=5, help="for the choice of rho")
    options = parser.parse_args()
    for noise in options.noise:
        table = Table(title=f"{100 * noise:.0f} % random labels, {options.seeds} seeds, {options.epochs} epochs")
        for column in ("", "rho", "test accuracy", "gradients a step", "time a step"):
            table.add_column(column, justify="left" if not column else "right")
        for name in track(METHODS, description=f"noise {noise}"):
            rho = choose_rho(name, noise, options.epochs, options.tuning_seeds)
            results = [
                train(name, rho, *load_digits(noise, seed), options.epochs, seed) for seed in range(options.seeds)
            ]
            accuracies = [accuracy for accuracy, _ in results]
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            seconds = statistics.median(seconds for _, seconds in results)
            row = (
                f"{statistics.mean(accuracies):.1f} ± {spread:.1f} %",
                f"{GRADIENTS[name]}",
                f"{1e6 * seconds:.0f} µs",
            )
            table.add_row(name, f"{rho or ''}", *row)
        Console().print(table)


if __name__ == "__main__":
    main()
