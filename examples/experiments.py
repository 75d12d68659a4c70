"""What the quickstart and the examples share: data, held-out parts, the choice of settings, results on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]  # images (n, 64), labels (n,)
TEST_SEED = 0  # draws the test images of every experiment that chooses settings


def generator(purpose: str, seed: int) -> torch.Generator:
    """For the draws of one purpose. With one generator, or one seed, for two purposes their draws would be alike."""
    digest = hashlib.sha256(f"{purpose}, {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4]))


def load_digits(noise: float, seed: int, test_seed: int | None = None) -> tuple[Data, Data]:
    """Training and test set (70 : 30), a share ``noise`` of the training labels replaced by random ones.

    ``seed`` draws the labels, and the test set too where ``test_seed`` is None. With a ``test_seed`` the same 540
    images are the test set whatever the seed is, so that no run trains on them and no choice is made with them.
    """
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images / 16.0, dtype=torch.float32)
    labels = torch.tensor(labels)
    train, test = model_selection.train_test_split(
        range(len(labels)),
        test_size=0.3,
        random_state=seed if test_seed is None else test_seed,
        stratify=labels.numpy(),
    )
    draws = generator("wrong labels", seed)
    train_labels = labels[train].clone()
    wrong = torch.randperm(len(train), generator=draws)[: round(noise * len(train))]
    train_labels[wrong] = torch.randint(10, (len(wrong),), generator=draws)
    return (images[train], train_labels), (images[test], labels[test])


def hold_out(data: Data, seed: int) -> tuple[Data, Data]:
    """Two thirds of a training set to train on, and a third to choose by. Wrong labels fall into both alike."""
    images, labels = data
    order = torch.randperm(len(labels), generator=generator("held out", seed))
    held_out, kept = order[: len(order) // 3], order[len(order) // 3 :]
    return (images[kept], labels[kept]), (images[held_out], labels[held_out])


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


Place = tuple[int, ...]  # a rung on each ladder


def neighbours(place: Place, ladders: Sequence[Sequence[float]]) -> Iterator[Place]:
    """One rung up or down, on one ladder at a time."""
    for axis, ladder in enumerate(ladders):
        for step in (1, -1):
            if 0 <= place[axis] + step < len(ladder):
                yield *place[:axis], place[axis] + step, *place[axis + 1 :]


def search(
    score: Callable[[Sequence[float]], float],
    ladders: Sequence[Sequence[float]],
    start: Sequence[float],
    budget: int,
) -> list[float]:
    """The best of ``budget`` settings, one value of each ladder (a ladder of one value is not searched).

    It begins at ``start``. What is tried next is a neighbour of the best setting so far that has one left to try. So
    ladders can be longer than anybody needs, and the choice lies at no edge of a list; ties go to what came first.
    """

    def values(place: Place) -> list[float]:
        return [ladder[rung] for ladder, rung in zip(ladders, place, strict=True)]

    first = tuple(ladder.index(value) for ladder, value in zip(ladders, start, strict=True))
    scores = {first: score(values(first))}
    while len(scores) < budget:
        for best in sorted(scores, key=lambda place: -scores[place]):
            untried = next((place for place in neighbours(best, ladders) if place not in scores), None)
            if untried is not None:
                scores[untried] = score(values(untried))
                break
        else:  # all of a small lattice was tried
            break
    return values(max(scores, key=lambda place: scores[place]))


class Runs:
    """Results of runs, in memory and as a line each of a file. A run that is there is not made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            run = json.loads(line)
            self.lines[json.dumps(run["run"])] = run["gave"]

    def of(self, run: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the run that is described by ``run`` gave; where it is not known, ``make()`` makes it."""
        name = json.dumps(run)
        if name not in self.lines:
            gave = self.lines[name] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"run": run, "gave": gave}) + "\n")
        return self.lines[name]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def write_into(page: Path, parts: Mapping[str, str]) -> None:
    """Each part between its marks, which are in the page."""
    text = page.read_text()
    for name, part in parts.items():
        before, begin, rest = text.partition(f"<!-- {name}: begin -->")
        _, end, after = rest.partition(f"<!-- {name}: end -->")
        if not end:
            raise ValueError(f"{page} has no '<!-- {name}: begin -->' with its end; put them where it is to stand")
        text = f"{before}{begin}\n\n{part}\n\n{end}{after}"
    page.write_text(text)
