"""Continual learning on digits: five tasks of two digits each, one after the other, with a small memory.

Experience replay (ER), dark experience replay (DER, DER++), each by SGD and by SAM, and MGSER-SAM. One head for all
ten digits, and no task labels at test time (class-incremental). rho and mu are chosen on a held-out part of the
training set; the test set is looked at once, with fresh seeds. Run it: ``python examples/continual_digits.py`` (some
minutes).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from sam_optim import MGSERSAM, SAM, ReservoirMemory, dark_experience_loss
from sam_optim.quickstart import Data, load_digits, make_model

TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
REPLAYS = ("ER", "DER", "DER++")
BATCH, LR = 10, 0.03
ALPHA, BETA = 0.2, 1.0  # weights of the stored logits and of the labels


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
SETTINGS: dict[str, list[dict[str, float]]] = {
    "SGD": [{}],
    "SAM": [{"rho": rho} for rho in (0.02, 0.05, 0.1, 0.2)],
    # A control: what the memory's second gradient does by itself.
    "MGSER-SAM with rho 0": [{"rho": 0.0, "mu": mu} for mu in (0.3, 1.0)],
    "MGSER-SAM": [{"rho": rho, "mu": mu} for rho, mu in itertools.product((0.02, 0.05, 0.1, 0.2), (0.3, 1.0))],
}


def memory_loss(model: nn.Module, replay: str, draws: list[tuple[Tensor, ...]]) -> Tensor:
    """L_s on one or two independent draws of (images, labels, logits)."""
    images, labels, logits = draws[0]
    if replay == "ER":
        return nn.functional.cross_entropy(model(images), labels)
    if replay == "DER":
        return dark_experience_loss(model(images), logits, alpha=ALPHA)
    others, other_labels, _ = draws[1]
    return dark_experience_loss(
        model(images), logits, alpha=ALPHA, labelled_logits=model(others), labels=other_labels, beta=BETA
    )


def train(
    method: Method, settings: dict[str, float], train_set: Data, test_set: Data, options: Any, seed: int
) -> tuple[Tensor, float]:
    """Accuracy in percent on each task (columns) after training on each (rows), and seconds a step."""
    torch.manual_seed(seed)
    model = make_model()
    memory = ReservoirMemory(options.memory, seed=seed)
    optimizer: Any
    if method.optimizer == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    else:
        cls = SAM if method.optimizer == "SAM" else MGSERSAM
        optimizer = cls(model.parameters(), torch.optim.SGD, lr=LR, **settings)
    accuracies, steps, start = [], 0, time.perf_counter()
    for task in TASKS:
        images, labels = of_digits(train_set, task)
        for _ in range(options.epochs):
            for index in torch.randperm(len(labels)).split(BATCH):
                x, y = images[index], labels[index]
                draws = [memory.sample(BATCH) for _ in range(2)] if len(memory) > 0 else []
                logits = make_step(model, optimizer, method, x, y, draws)
                memory.add(x, y, logits)  # the logits from before the step
                steps += 1
        accuracies.append([accuracy(model, of_digits(test_set, task)) for task in TASKS])
    return torch.tensor(accuracies), (time.perf_counter() - start) / steps


def make_step(
    model: nn.Module, optimizer: Any, method: Method, x: Tensor, y: Tensor, draws: list[tuple[Tensor, ...]]
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
                memory_loss(model, method.replay, draws).backward()
        return seen[0]

    def backward() -> None:
        task_loss().backward()
        if draws:
            memory_loss(model, method.replay, draws).backward()

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


def choose(method: Method, options: Any) -> dict[str, float]:
    """The settings with the best mean accuracy on a held-out third of the training set."""
    scores = []
    for settings in SETTINGS[method.optimizer]:
        results = []
        for seed in range(1000, 1000 + options.tuning_seeds):
            (images, labels), _ = load_digits(0.0, seed)
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            held_out, kept = order[: len(order) // 3], order[len(order) // 3 :]
            sets = (images[kept], labels[kept]), (images[held_out], labels[held_out])
            results.append(final_accuracy(train(method, settings, *sets, options, seed)[0]))
        scores.append(statistics.mean(results))
    return SETTINGS[method.optimizer][scores.index(max(scores))]


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--memory", type=int, default=50, help="samples in the memory")
    parser.add_argument("--epochs", type=int, default=5, help="for each task")
    parser.add_argument("--seeds", type=int, default=10, help="for the test accuracies")
    parser.add_argument("--tuning-seeds", type=int, default=5, help="for the choice of rho and mu")
    options = parser.parse_args()
    table = Table(title=f"Five tasks of two digits, memory of {options.memory}, {options.seeds} seeds")
    for column in ("", "settings", "accuracy", "forgetting", "time a step"):
        table.add_column(column, justify="left" if not column else "right")
    for method in track(METHODS):
        settings = choose(method, options)
        results = [train(method, settings, *load_digits(0.0, seed), options, seed) for seed in range(options.seeds)]
        table.add_row(
            str(method),
            ", ".join(f"{name} {value}" for name, value in settings.items()),
            spread([final_accuracy(accuracies) for accuracies, _ in results]),
            spread([forgetting(accuracies) for accuracies, _ in results]),
            f"{1e6 * statistics.median(seconds for _, seconds in results):.0f} µs",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
