"""SGD, SAM, Agnostic-SAM, Align-SAM, SAMPa and SAM's family on digits with random training labels.

Every method, SGD included, is tuned alike: by as many settings, on parts of the training set that were held out with
their wrong labels. A setting is a radius (SGD has none), a weight decay and a number of epochs. The search starts in
the middle and walks to better neighbours, so that its lists have no edge it could stop at. The 540 test images are the
same in all runs, take no part in any choice, and are looked at with the chosen settings and fresh seeds.

Each run's result is a line of ``examples/results/label_noise.jsonl``. What is there is not run again, so a run that was
stopped goes on, and with the file as it comes the tables are there at once:

``python examples/label_noise.py`` (half an hour from nothing), or for other methods and shares of wrong labels
``--noise 0.4 --methods SGD GSAM ...``; ``--page docs/experiments.md`` writes the tables into the page.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from experiments import TEST_SEED, Runs, hold_out, load_digits, markdown_table, search, write_into
from quickstart import CHOSEN, LR, MOMENTUM, NOT_TUNED, Settings, train
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
    "AE-SAM": AESAM,
    "SAM every 2nd step": IntervalSAM,
    "GSAM": GSAM,
    "WSAM": WSAM,
    "Friendly SAM": FriendlySAM,
    "Stable SAM": StableSAM,
    "Unified SAM": UnifiedSAM,
    "VaSSO": VaSSO,
    "CR-SAM": CRSAM,
}
ALL = {**METHODS, **FAMILY, NOT_TUNED: None}
# What the page shows: the share of random labels, and the methods.
TABLES: dict[str, tuple[float, list[str]]] = {
    "60 % random labels": (0.6, [NOT_TUNED, "SGD", "SAM", "SAMPa", "Align-SAM", "Agnostic-SAM"]),
    "80 % random labels": (0.8, [NOT_TUNED, "SGD", "SAM", "Align-SAM", "Agnostic-SAM"]),
    "family, 60 % random labels": (0.6, ["SGD", "SAM", "Momentum-SAM", "LookSAM", "AE-SAM", "SAM every 2nd step"]),
}

# Ladders that go on beyond where any method learns. The search starts at 0.1, 0.001 and 30.
RHOS = tuple(0.00625 * 2**i for i in range(-8, 14))
DECAYS = (0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
EPOCHS = (2, 4, 8, 15, 30, 60, 120, 240)

BUDGET = 12  # settings that are tried for each method
TUNING_SEEDS = (1000, 1001, 1002)
TEST_SEEDS = tuple(range(5))
RESULTS = Path(__file__).parent / "results" / "label_noise.jsonl"


def make(method: str, settings: Settings) -> Callable[[nn.Module], Any]:
    of_base = {"lr": LR, "momentum": MOMENTUM, "weight_decay": settings.weight_decay}
    if ALL[method] is None:
        return lambda model: torch.optim.SGD(model.parameters(), **of_base)
    return lambda model: ALL[method](model.parameters(), torch.optim.SGD, settings.rho, **of_base)


def run(method: str, settings: Settings, noise: float, on: str, seed: int, runs: Runs) -> dict[str, Any]:
    """Accuracy in percent, "held out" or on the "test" set, and gradients a step."""

    def trained() -> dict[str, Any]:
        train_set, test_set = load_digits(noise, seed, TEST_SEED)
        sets = hold_out(train_set, seed) if on == "held out" else (train_set, test_set)
        found = train(make(method, settings), *sets, settings.epochs, seed)
        gradients = found.gradients / len(found.step_seconds)
        return {"accuracy": round(found.accuracies[-1], 3), "gradients": round(gradients, 3)}

    return runs.of({"noise": noise, "method": method, **settings._asdict(), "on": on, "seed": seed}, trained)


def choose(method: str, noise: float, runs: Runs) -> Settings:
    """The settings with the best mean accuracy on held-out thirds of the noisy training set."""

    def score(values: Sequence[float]) -> float:
        settings = settings_of_values(values)
        return statistics.mean(run(method, settings, noise, "held out", s, runs)["accuracy"] for s in TUNING_SEEDS)

    has_rho = ALL[method] is not None
    ladders = (RHOS if has_rho else (0.0,), DECAYS, EPOCHS)
    return settings_of_values(search(score, ladders, (0.1 if has_rho else 0.0, 0.001, 30), BUDGET))


def settings_of_values(values: Sequence[float]) -> Settings:
    rho, weight_decay, epochs = values
    return Settings(rho, weight_decay, int(epochs))


HEADER = ["", "gradients a step", "rho", "weight decay", "epochs", "test accuracy", "above SGD"]


def tested(method: str, noise: float, runs: Runs) -> tuple[Settings, list[dict[str, Any]]]:
    """The method's settings, and its runs with them on the test set."""
    settings = CHOSEN[method] if method == NOT_TUNED else choose(method, noise, runs)
    return settings, [run(method, settings, noise, "test", seed, runs) for seed in TEST_SEEDS]


def row_of(method: str, noise: float, runs: Runs) -> list[str]:
    settings, found = tested(method, noise, runs)
    accuracies = [one["accuracy"] for one in found]
    above = [one["accuracy"] - base["accuracy"] for one, base in zip(found, tested("SGD", noise, runs)[1], strict=True)]
    error = statistics.stdev(above) / len(above) ** 0.5
    return [
        method,
        f"{statistics.mean(one['gradients'] for one in found):.2g}",
        f"{settings.rho:g}" if settings.rho else "",
        f"{settings.weight_decay:g}",
        f"{settings.epochs}",
        f"{statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f} %",
        "" if method == "SGD" else f"{statistics.mean(above):+.1f} ± {error:.1f}",
    ]


def main(arguments: list[str] | None = None) -> dict[str, str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="+", help="shares of random labels; otherwise the page's tables")
    parser.add_argument("--methods", nargs="+", choices=list(ALL), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the runs are kept")
    parser.add_argument("--page", type=Path, help="a page to write the tables into")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    wanted = TABLES
    if options.noise is not None:
        wanted = {f"{100 * noise:g} % random labels": (noise, options.methods) for noise in options.noise}
    runs = Runs(options.results)
    tables = {}
    for name, (noise, methods) in wanted.items():
        rows = [row_of(method, noise, runs) for method in track(methods, description=name)]
        tables[name] = markdown_table(HEADER, rows)
        print(f"\n{name}\n\n{tables[name]}\n")
    if options.page is not None:
        write_into(options.page, tables)
    return tables


if __name__ == "__main__":
    main()
