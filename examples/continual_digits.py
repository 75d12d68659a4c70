"""Continual learning on digits: five tasks of two digits each, one after the other, with a small memory.

Experience replay (ER), dark experience replay (DER, DER++), each by SGD and by SAM, and MGSER-SAM. One head for all
ten digits, and no task labels at test time (class-incremental).

Every method is tuned alike, SGD included: as many settings of learning rate, weight of the memory's loss, rho and mu,
by the mean accuracy on held-out parts of the training set. The 540 test images are the same in all runs, take no part
in a choice, and are looked at with fresh seeds. Each run is a line of ``examples/results/continual_digits.jsonl``, and
is not made again.

Run it: ``python examples/continual_digits.py`` (ten minutes from nothing); ``--page docs/experiments.md`` writes the
table into the page.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from experiments import (
    TEST_SEED,
    Data,
    Runs,
    generator,
    hold_out,
    load_digits,
    make_model,
    markdown_table,
    search,
    write_into,
)
from sam_optim import MGSERSAM, SAM, ReservoirMemory, dark_experience_loss

TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
REPLAYS = ("ER", "DER", "DER++")
BATCH = 10
ALPHA, BETA = 0.2, 1.0  # weights of the stored logits and of the labels, times the weight that is chosen


class Method(NamedTuple):
    """How the memory is used, and by which optimizer."""

    replay: str
    optimizer: str

    def __str__(self) -> str:
        return {"SGD": self.replay, "SAM": f"{self.replay} + SAM"}.get(self.optimizer, self.optimizer)


METHODS = [
    *(Method(replay, optimizer) for replay in REPLAYS for optimizer in ("SGD", "SAM")),
    Method("DER++", "MGSER-SAM with rho 0"),
    Method("DER++", "MGSER-SAM"),
]
# What is searched, by which ladders, and from where.
LADDERS = {
    "lr": tuple(0.001875 * 2**i for i in range(9)),
    "weight": tuple(2.0**i for i in range(-5, 6)),
    "rho": tuple(0.00125 * 2**i for i in range(12)),
    "mu": tuple(2.0**i for i in range(-5, 6)),
}
START = {"lr": 0.03, "weight": 1.0, "rho": 0.04, "mu": 1.0}
SEARCHED = {
    "SGD": ("lr", "weight"),
    "SAM": ("rho", "lr", "weight"),
    "MGSER-SAM with rho 0": ("mu", "lr", "weight"),  # a control: what the memory's second gradient does by itself
    "MGSER-SAM": ("rho", "mu", "lr", "weight"),
}
BUDGET = 10  # settings that are tried for each method
TUNING_SEEDS = (1000, 1001, 1002)
RESULTS = Path(__file__).parent / "results" / "continual_digits.jsonl"


def memory_loss(model: nn.Module, replay: str, draws: list[tuple[Tensor, ...]], weight: float) -> Tensor:
    """L_s on one or two independent draws of (images, labels, logits)."""
    images, labels, logits = draws[0]
    if replay == "ER":
        return weight * nn.functional.cross_entropy(model(images), labels)
    alpha, beta = weight * ALPHA, weight * BETA
    if replay == "DER":
        return dark_experience_loss(model(images), logits, alpha=alpha)
    others, other_labels, _ = draws[1]
    return dark_experience_loss(
        model(images), logits, alpha=alpha, labelled_logits=model(others), labels=other_labels, beta=beta
    )


def train(
    method: Method, settings: dict[str, float], train_set: Data, test_set: Data, options: Any, seed: int
) -> tuple[Tensor, float]:
    """Accuracy in percent on each task (columns) after training on each (rows), and seconds a step.

    ``settings`` are lr, weight, rho and mu, as far as the method has them.
    """
    torch.manual_seed(seed)
    model = make_model()
    memory = ReservoirMemory(options.memory, seed=generator("memory", seed).initial_seed())
    of_method = {"rho": 0.0, **settings} if method.optimizer == "MGSER-SAM with rho 0" else dict(settings)
    weight = of_method.pop("weight", 1.0)
    optimizer: Any
    if method.optimizer == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), **of_method)
    else:
        cls = SAM if method.optimizer == "SAM" else MGSERSAM
        optimizer = cls(model.parameters(), torch.optim.SGD, **of_method)
    accuracies, steps, start = [], 0, time.perf_counter()
    for task in TASKS:
        images, labels = of_digits(train_set, task)
        for _ in range(options.epochs):
            for index in torch.randperm(len(labels)).split(BATCH):
                x, y = images[index], labels[index]
                draws = [memory.sample(BATCH) for _ in range(2)] if len(memory) > 0 else []
                logits = make_step(model, optimizer, method, x, y, draws, weight)
                memory.add(x, y, logits)  # the logits from before the step
                steps += 1
        accuracies.append([accuracy(model, of_digits(test_set, task)) for task in TASKS])
    return torch.tensor(accuracies), (time.perf_counter() - start) / steps


def make_step(
    model: nn.Module,
    optimizer: Any,
    method: Method,
    x: Tensor,
    y: Tensor,
    draws: list[tuple[Tensor, ...]],
    weight: float,
) -> Tensor:
    """One step on a batch and what was drawn from the memory; returns the batch's logits before it."""
    seen: list[Tensor] = []

    def task_loss() -> Tensor:
        logits = model(x)
        seen.append(logits.detach())
        return nn.functional.cross_entropy(logits, y)

    if isinstance(optimizer, MGSERSAM):
        for p in optimizer.each_pass():
            if p.data == "train":
                task_loss().backward()
            elif draws:
                memory_loss(model, method.replay, draws, weight).backward()
        return seen[0]

    def backward() -> None:
        task_loss().backward()
        if draws:
            memory_loss(model, method.replay, draws, weight).backward()

    backward()
    if isinstance(optimizer, SAM):
        optimizer.first_step(zero_grad=True)
        backward()
        optimizer.second_step(zero_grad=True)
    else:
        optimizer.step()
        optimizer.zero_grad()
    return seen[0]


def of_digits(data: Data, digits: tuple[int, ...]) -> Data:
    images, labels = data
    chosen = torch.isin(labels, torch.tensor(digits))
    return images[chosen], labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    return 100.0 * (model(data[0]).argmax(1) == data[1]).float().mean().item()


def final_accuracy(accuracies: Tensor) -> float:
    """Mean over the tasks, after the last one."""
    return accuracies[-1].mean().item()


def forgetting(accuracies: Tensor) -> float:
    """How far the tasks but the last have fallen from their best, on average (Chaudhry et al. 2018)."""
    return (accuracies[:-1].max(0).values - accuracies[-1])[:-1].mean().item()


def run(method: Method, settings: dict[str, float], options: Any, on: str, seed: int, runs: Runs) -> dict[str, Any]:
    """Accuracy and forgetting in percent, "held out" or on the "test" set."""

    def trained() -> dict[str, Any]:
        train_set, test_set = load_digits(0.0, seed, TEST_SEED)
        sets = hold_out(train_set, seed) if on == "held out" else (train_set, test_set)
        accuracies, seconds = train(method, settings, *sets, options, seed)
        return {
            "accuracy": round(final_accuracy(accuracies), 3),
            "forgetting": round(forgetting(accuracies), 3),
            "seconds": round(seconds, 6),
        }

    of_task = {"memory": options.memory, "epochs": options.epochs}
    return runs.of({"method": str(method), **settings, **of_task, "on": on, "seed": seed}, trained)


def choose(method: Method, options: Any, runs: Runs) -> dict[str, float]:
    """The settings with the best mean accuracy on held-out thirds of the training set."""
    names = SEARCHED[method.optimizer]

    def score(values: Sequence[float]) -> float:
        settings = dict(zip(names, values, strict=True))
        return statistics.mean(run(method, settings, options, "held out", s, runs)["accuracy"] for s in TUNING_SEEDS)

    chosen = search(score, [LADDERS[name] for name in names], [START[name] for name in names], BUDGET)
    return dict(zip(names, chosen, strict=True))


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f} %"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, default=50, help="samples in the memory")
    parser.add_argument("--epochs", type=int, default=5, help="for each task")
    parser.add_argument("--seeds", type=int, default=5, help="for the test accuracies")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the runs are kept")
    parser.add_argument("--page", type=Path, help="a page to write the table into")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = Runs(options.results)
    rows = []
    for method in track(METHODS):
        settings = choose(method, options, runs)
        found = [run(method, settings, options, "test", seed, runs) for seed in range(options.seeds)]
        chosen = [f"{settings[name]:g}" if name in settings else "" for name in LADDERS]
        rows.append([str(method), *chosen, *(spread([one[of] for one in found]) for of in ("accuracy", "forgetting"))])
    table = markdown_table(["", *LADDERS, "accuracy", "forgetting"], rows)
    print(f"\n{table}")
    if options.page is not None:
        write_into(options.page, {"continual digits": table})


if __name__ == "__main__":
    main()
