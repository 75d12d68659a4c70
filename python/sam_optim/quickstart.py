"""SAM against SGD on real data with wrong labels: ``python -m sam_optim.quickstart``.

Trains a small network on scikit-learn's handwritten digits after most of the training labels have been replaced at
random, with SGD, with SAM as it is commonly written, and with this package's SAM and Agnostic-SAM. Prints test
accuracies and times, and saves a picture of the curves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sam_kernels
from sam_optim import SAM, AgnosticSAM
from sam_optim.per_tensor import PerTensorSAM

Data = tuple[Tensor, Tensor]


def load_digits(noise: float, seed: int) -> tuple[Data, Data]:
    """Training and test set (70 : 30), a share ``noise`` of the training labels replaced by random ones."""
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images / 16.0, dtype=torch.float32)
    labels = torch.tensor(labels)
    train, test = model_selection.train_test_split(
        range(len(labels)), test_size=0.3, random_state=seed, stratify=labels.numpy()
    )
    generator = torch.Generator().manual_seed(seed)
    train_labels = labels[train].clone()
    wrong = torch.randperm(len(train), generator=generator)[: round(noise * len(train))]
    train_labels[wrong] = torch.randint(10, (len(wrong),), generator=generator)
    return (images[train], train_labels), (images[test], labels[test])


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def make_optimizer(name: str, model: nn.Module, lr: float, rho: float) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": lr, "momentum": 0.9}
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), **settings)
    if name == "Agnostic-SAM":
        return AgnosticSAM(model.parameters(), torch.optim.SGD, rho_train=rho, **settings)
    sam = PerTensorSAM if name == "per-tensor SAM" else SAM
    return sam(model.parameters(), torch.optim.SGD, rho=rho, **settings)


@dataclass
class Run:
    """What one training run gives."""

    accuracies: list[float] = field(default_factory=list)  # on the test set, after each epoch
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)  # of each step: without forward and backward


def train_step(model: nn.Module, optimizer: Any, batch: Data, validation_batch: Data) -> tuple[float, float]:
    """One step; returns its seconds, and how many of them the optimizer took. All that SAM changes is in here."""
    in_passes = 0.0

    def backward(x: Tensor, y: Tensor) -> None:
        nonlocal in_passes
        start = time.perf_counter()
        nn.functional.cross_entropy(model(x), y).backward()
        in_passes += time.perf_counter() - start

    start = time.perf_counter()
    if isinstance(optimizer, AgnosticSAM):
        for p in optimizer.each_pass():
            backward(*(batch if p.data == "train" else validation_batch))
    elif isinstance(optimizer, (SAM, PerTensorSAM)):
        backward(*batch)
        optimizer.first_step(zero_grad=True)
        backward(*batch)
        optimizer.second_step(zero_grad=True)
    else:
        backward(*batch)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    return seconds, seconds - in_passes


def train(
    name: str, train_set: Data, test_set: Data, options: argparse.Namespace, seed: int, on_epoch: Callable[[], None]
) -> Run:
    torch.manual_seed(seed)
    model = make_model()
    optimizer = make_optimizer(name, model, options.lr, options.rho)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        getattr(optimizer, "base_optimizer", optimizer), options.epochs
    )
    run = Run()
    images, labels = train_set
    for _ in range(options.epochs):
        for index in torch.randperm(len(labels)).split(options.batch_size):
            # An independent draw from the training set, a quarter of the batch; only Agnostic-SAM looks at it.
            second = torch.randint(len(labels), (max(1, options.batch_size // 4),))
            batch, validation_batch = (images[index], labels[index]), (images[second], labels[second])
            step_seconds, optimizer_seconds = train_step(model, optimizer, batch, validation_batch)
            run.step_seconds.append(step_seconds)
            run.optimizer_seconds.append(optimizer_seconds)
        scheduler.step()
        with torch.no_grad():
            correct = model(test_set[0]).argmax(1) == test_set[1]
        run.accuracies.append(100.0 * correct.float().mean().item())
        on_epoch()
    return run


def print_table(runs: dict[str, list[Run]], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    noise = f"{100 * options.noise:.0f} % of training labels random"
    table = Table(title=f"Digits, {noise}, {options.seeds} seeds, {options.epochs} epochs")
    for column in ("", "test accuracy", "time a step", "of which optimizer"):
        table.add_column(column, justify="left" if not column else "right")
    for name, of_name in runs.items():
        final = [run.accuracies[-1] for run in of_name]
        spread = statistics.stdev(final) if len(final) > 1 else 0.0
        step = statistics.median(s for run in of_name for s in run.step_seconds)
        optimizer = statistics.median(s for run in of_name for s in run.optimizer_seconds)
        table.add_row(
            name, f"{statistics.mean(final):.1f} ± {spread:.1f} %", f"{1e6 * step:.0f} µs", f"{1e6 * optimizer:.0f} µs"
        )
    console = Console()
    console.print(table)
    kernels = sam_kernels.backends()["cpu"]
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; cpu kernels: {kernels.detail}")


def save_picture(runs: dict[str, list[Run]], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 2), layout="constrained")
    for name, colour in (("SGD", "tab:gray"), ("SAM", "tab:blue"), ("Agnostic-SAM", "tab:green")):
        accuracies = torch.tensor([run.accuracies for run in runs[name]])
        mean, spread = accuracies.mean(0), accuracies.std(0, correction=0)
        epochs = range(1, options.epochs + 1)
        curves.plot(epochs, mean, color=colour, label=name)
        curves.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
    curves.set(xlabel="epoch", ylabel="test accuracy, %", title=f"{100 * options.noise:.0f} % random training labels")
    curves.legend(loc="lower right")
    curves.grid(alpha=0.3)
    names = ["per-tensor SAM", "SAM"]
    medians = [1e6 * statistics.median(s for run in runs[name] for s in run.optimizer_seconds) for name in names]
    drawn = bars.barh(["SAM as commonly\nwritten", "this package"], medians, color=["tab:orange", "tab:blue"])
    bars.bar_label(drawn, fmt="%.0f µs", padding=3)
    bars.set(
        xlabel="optimizer's share of a step, µs", title="6 tensors, 85,002 parameters", xlim=(0, 1.25 * max(medians))
    )
    figure.savefig(options.output, dpi=120)
    pyplot.close(figure)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sam_optim.quickstart",
        description="SGD against SAM and Agnostic-SAM on scikit-learn's digits with random training labels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--noise", type=float, default=0.6, help="share of training labels replaced at random")
    parser.add_argument("--rho", type=float, default=0.2, help="radius of SAM's perturbation")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate at the start of the cosine schedule")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5, help="number of runs of each optimizer")
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"), help="where to save the picture")
    options = parser.parse_args(arguments)
    if not 0.0 <= options.noise <= 1.0:
        parser.error(f"--noise must lie between 0 and 1, got {options.noise}")
    if min(options.epochs, options.seeds, options.batch_size) < 1:
        parser.error("--epochs, --seeds and --batch-size must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Run]]:
    options = parse_arguments(arguments)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    runs: dict[str, list[Run]] = {"SGD": [], "per-tensor SAM": [], "SAM": [], "Agnostic-SAM": []}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=options.seeds * len(runs) * options.epochs)
        for seed in range(options.seeds):
            train_set, test_set = load_digits(options.noise, seed)
            for name in runs:
                progress.update(task, description=f"{name}, seed {seed}")
                runs[name].append(train(name, train_set, test_set, options, seed, lambda: progress.advance(task)))
        progress.update(task, description="done")
    print_table(runs, options)
    save_picture(runs, options)
    print(f"curves saved to {options.output}")
    return runs


if __name__ == "__main__":
    main()
