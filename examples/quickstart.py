"""SAM against SGD on real data with wrong labels: ``python examples/quickstart.py``.

Trains a small network on scikit-learn's handwritten digits after most of the training labels have been replaced at
random: with SGD, with SAM as it is commonly written, and with this package's SAM and Agnostic-SAM, each with the
settings that were chosen for it on held-out training data; and with SGD as many run it, not tuned. Prints test
accuracies and times, and saves a picture of the curves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sam_kernels
from experiments import TEST_SEED, Data, load_digits, make_model
from per_tensor_sam import PerTensorSAM
from sam_optim import SAM, AgnosticSAM
from sam_optim.core.optimizer import SharpnessAwareOptimizer


class Settings(NamedTuple):
    """What is chosen for each optimizer by itself. SGD has no rho."""

    rho: float
    weight_decay: float
    epochs: int  # of the whole cosine schedule


NOT_TUNED = "SGD, not tuned"
# Chosen by examples/label_noise.py at 60 % random labels, as docs/experiments.md tells.
CHOSEN = {
    "SGD": Settings(0.0, 0.003, 30),
    "SAM": Settings(0.2, 0.0, 30),
    "Agnostic-SAM": Settings(0.2, 0.0003, 30),
    NOT_TUNED: Settings(0.0, 0.0, 60),  # nobody's choice
}
LR, MOMENTUM, BATCH = 0.05, 0.9, 64


def settings_of(name: str, options: argparse.Namespace | None = None) -> Settings:
    """What was chosen, but for what the options say."""
    settings = CHOSEN["SAM" if name == "per-tensor SAM" else name]
    if options is not None:
        if options.rho is not None and settings.rho:
            settings = settings._replace(rho=options.rho)
        if options.weight_decay is not None and name != NOT_TUNED:
            settings = settings._replace(weight_decay=options.weight_decay)
        if options.epochs is not None:
            settings = settings._replace(epochs=options.epochs)
    return settings


def make_optimizer(name: str, settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    of_base: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": settings.weight_decay}
    if name in ("SGD", NOT_TUNED):
        return torch.optim.SGD(model.parameters(), **of_base)
    if name == "Agnostic-SAM":
        return AgnosticSAM(model.parameters(), torch.optim.SGD, rho_train=settings.rho, **of_base)
    sam = PerTensorSAM if name == "per-tensor SAM" else SAM
    return sam(model.parameters(), torch.optim.SGD, rho=settings.rho, **of_base)


@dataclass
class Run:
    """What one training run gives."""

    accuracies: list[float] = field(default_factory=list)  # on the test set, after each epoch
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)  # of each step: without forward and backward
    gradients: int = 0  # of all steps together


def train_step(model: nn.Module, optimizer: Any, batches: dict[str, Data]) -> tuple[float, float, int]:
    """One step: its seconds, those of the optimizer among them, and its gradients. All that SAM changes is in here."""
    in_passes, gradients = 0.0, 0

    def backward(x: Tensor, y: Tensor) -> None:
        nonlocal in_passes, gradients
        start = time.perf_counter()
        nn.functional.cross_entropy(model(x), y).backward()
        in_passes += time.perf_counter() - start
        gradients += 1

    batch = batches["train"]
    start = time.perf_counter()
    if type(optimizer) in (SAM, PerTensorSAM):
        backward(*batch)
        optimizer.first_step(zero_grad=True)
        backward(*batch)
        optimizer.second_step(zero_grad=True)
    elif isinstance(optimizer, SharpnessAwareOptimizer):
        for p in optimizer.each_pass():
            backward(*batches[p.data])
    else:
        backward(*batch)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    return seconds, seconds - in_passes, gradients


def train(
    make: Callable[[nn.Module], Any],
    train_set: Data,
    test_set: Data,
    epochs: int,
    seed: int,
    on_epoch: Callable[[], None] | None = None,
) -> Run:
    """A network with the optimizer that ``make`` makes for it, on a cosine schedule."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(getattr(optimizer, "base_optimizer", optimizer), epochs)
    run = Run()
    images, labels = train_set
    batches: dict[str, Data] = {}
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(BATCH):
            # An independent draw from the training set, a quarter of the batch, for Agnostic-SAM; and what SAMPa needs.
            second = torch.randint(len(labels), (BATCH // 4,))
            if "train" in batches:
                batches["previous"] = batches["train"]
            batches["train"] = images[index], labels[index]
            batches["validation"] = images[second], labels[second]
            step_seconds, optimizer_seconds, gradients = train_step(model, optimizer, batches)
            run.step_seconds.append(step_seconds)
            run.optimizer_seconds.append(optimizer_seconds)
            run.gradients += gradients
        scheduler.step()
        with torch.no_grad():
            correct = model(test_set[0]).argmax(1) == test_set[1]
        run.accuracies.append(100.0 * correct.float().mean().item())
        if on_epoch is not None:
            on_epoch()
    return run


def print_table(runs: dict[str, list[Run]], options: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Digits, {100 * options.noise:.0f} % of training labels random, {options.seeds} seeds",
    )
    for column in ("", "rho", "decay", "epochs", "test accuracy", "a step", "optimizer"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=not column)
    for name, of_name in runs.items():
        settings = settings_of(name, options)
        final = [run.accuracies[-1] for run in of_name]
        spread = statistics.stdev(final) if len(final) > 1 else 0.0
        step = statistics.median(s for run in of_name for s in run.step_seconds)
        optimizer = statistics.median(s for run in of_name for s in run.optimizer_seconds)
        table.add_row(
            name,
            f"{settings.rho:g}" if settings.rho else "",
            f"{settings.weight_decay:g}",
            f"{settings.epochs}",
            f"{statistics.mean(final):.1f} ± {spread:.1f} %",
            f"{1e6 * step:.0f} µs",
            f"{1e6 * optimizer:.0f} µs",
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
    colours = {NOT_TUNED: "tab:gray", "SGD": "tab:orange", "SAM": "tab:blue", "Agnostic-SAM": "tab:green"}
    for name, colour in colours.items():
        accuracies = torch.tensor([run.accuracies for run in runs[name]])
        mean, spread = accuracies.mean(0), accuracies.std(0, correction=0)
        epochs = range(1, len(mean) + 1)
        label = f"{name}: {mean[-1]:.1f} %"
        curves.plot(epochs, mean, color=colour, label=label, linestyle="--" if name == NOT_TUNED else "-")
        curves.plot(epochs[-1], mean[-1], color=colour, marker="o", markersize=5)
        curves.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    worst = min(statistics.mean(run.accuracies[-1] for run in runs[name]) for name in colours)
    curves.set(xlabel="epoch", ylabel="test accuracy, %", title=f"{100 * options.noise:.0f} % random training labels")
    curves.set_ylim(bottom=max(0.0, worst - 15.0))
    curves.legend(loc="lower right", fontsize="small")
    curves.grid(alpha=0.3)
    names = ["per-tensor SAM", "SAM"]
    medians = [1e6 * statistics.median(s for run in runs[name] for s in run.optimizer_seconds) for name in names]
    drawn = bars.barh(["SAM as commonly\nwritten", "this package"], medians, color=["tab:red", "tab:blue"])
    bars.bar_label(drawn, fmt="%.0f µs", padding=3)
    bars.set(
        xlabel="optimizer's share of a step, µs", title="6 tensors, 85,002 parameters", xlim=(0, 1.4 * max(medians))
    )
    figure.savefig(options.output, dpi=120)
    pyplot.close(figure)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python examples/quickstart.py",
        description="SGD against SAM and Agnostic-SAM on scikit-learn's digits with random training labels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--noise", type=float, default=0.6, help="share of training labels replaced at random")
    for name, kind, meaning in (
        ("--rho", float, "radius of the perturbations"),
        ("--weight-decay", float, "of all but the SGD that is not tuned"),
        ("--epochs", int, "of every run"),
    ):
        parser.add_argument(name, type=kind, help=f"{meaning}; otherwise what was chosen for each optimizer by itself")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs of each optimizer")
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"), help="where to save the picture")
    options = parser.parse_args(arguments)
    if not 0.0 <= options.noise <= 1.0:
        parser.error(f"--noise must lie between 0 and 1, got {options.noise}")
    if options.seeds < 1 or (options.epochs is not None and options.epochs < 1):
        parser.error("--epochs and --seeds must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Run]]:
    options = parse_arguments(arguments)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    runs: dict[str, list[Run]] = {name: [] for name in (NOT_TUNED, "SGD", "per-tensor SAM", "SAM", "Agnostic-SAM")}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        total = options.seeds * sum(settings_of(name, options).epochs for name in runs)
        task = progress.add_task("training", total=total)
        for seed in range(options.seeds):
            sets = load_digits(options.noise, seed, TEST_SEED)
            for name in runs:
                progress.update(task, description=f"{name}, seed {seed}")
                settings = settings_of(name, options)
                make = partial(make_optimizer, name, settings)
                runs[name].append(train(make, *sets, settings.epochs, seed, on_epoch=lambda: progress.advance(task)))
        progress.update(task, description="done")
    print_table(runs, options)
    save_picture(runs, options)
    print(f"curves saved to {options.output}")
    return runs


if __name__ == "__main__":
    main()
