"""What there is of a visit to a GPU, and whether the kernels are as fast as they are meant to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import records
from .records import Row

OURS, TRITON = "sam-kernels", "sam-kernels, Triton"

Case = tuple[str, str, str]  # model, base, type

# What tells rows of one table apart.
_KEYS = ("form", "model", "base", "dtype", "tuning", "network", "batch", "step")


class Evidence:
    """What is there of one GPU: the last row for each case.

    Rows of another machine than the last one are left out.

    Args:
        folder: with the results.
    """

    def __init__(self, folder: Path) -> None:
        self.machines: list[Row] = []
        self.rows: dict[str, dict[tuple[str, ...], Row]] = {}
        for row in records.read(folder / records.RESULTS):
            if row["table"] == "machine":
                if self.machines and self.machines[-1]["device"] != row["device"]:
                    self.machines, self.rows = [], {}
                self.machines.append(row)
            else:
                key = tuple(str(row[name]) for name in _KEYS if name in row)
                self.rows.setdefault(row["table"], {})[key] = row
        self.tests = list({row["test"]: row for row in records.read(folder / records.TESTS)}.values())
        self.stages = list({row["stage"]: row for row in records.read(folder / records.STAGES)}.values())

    def table(self, name: str) -> list[Row]:
        """The rows of a table."""
        return list(self.rows.get(name, {}).values())

    def core(self, form: str, model: str | None = None) -> dict[Case, Row]:
        """Measured steps of a form by model, base and type."""
        found = [row for row in self.table("core") if row["form"] == form and "ms" in row]
        return {(r["model"], r["base"], r["dtype"]): r for r in found if model is None or r["model"] == model}

    @property
    def copy(self) -> float | None:
        """GB a second, read and written."""
        found = self.table("copy")
        return found[-1]["gb_per_second"] if found else None


class Target(NamedTuple):
    """What was aimed at, and what was found: the case that is farthest from it."""

    aim: str
    found: str
    met: bool | None  # None if nothing was measured

    @staticmethod
    def of(aim: str, found: dict[Case, float], farthest: Any, is_met: Callable[[float], bool], form: str) -> Target:
        """Of all cases that were measured."""
        if not found:
            return Target(aim, "not measured", None)
        case = farthest(found, key=found.__getitem__)
        return Target(aim, f"{form.format(found[case])} ({', '.join(case)})", is_met(found[case]))


def targets(evidence: Evidence) -> list[Target]:
    """The aims of the kernels for GPUs."""
    ours, copy = evidence.core(OURS), evidence.copy
    share = {k: 100 * row["gb_per_second"] / copy for k, row in ours.items() if copy and row["parameters"] >= 10**8}
    launched = {
        (row["model"], row["base"], row["dtype"]): float(row["launches"])
        for row in evidence.table("launches")
        if row["form"] == OURS and "launches" in row
    }
    resnet = evidence.core(OURS, "resnet50")
    large = evidence.core(OURS, "1.24 B")
    to_triton = _ratios(evidence.core(TRITON), ours, "ms")
    return [
        _least("at least 90 % of a copy's bandwidth from 100 M parameters on", share, 90.0, "{:.0f} %"),
        _most("2 launches a step", launched, 2.0, "{:.0f}"),
        _least(
            "at least 15 times as fast as per-tensor SAM for ResNet-50",
            _ratios(evidence.core("per-tensor SAM"), resnet),
            15.0,
        ),
        _least("at least 4 times as fast as foreach SAM for ResNet-50", _ratios(_foreach(evidence), resnet), 4.0),
        _least(
            "at least 2 times as fast as foreach SAM for 1.24 B parameters", _ratios(_foreach(evidence), large), 2.0
        ),
        _most("Triton takes at most 1.1 times as long as CUDA C++", to_triton, 1.1),
    ]


def _foreach(evidence: Evidence) -> dict[Case, Row]:
    return evidence.core("foreach SAM") | evidence.core("foreach masters")


def _ratios(slower: dict[Case, Row], faster: dict[Case, Row], time: str = "loop_ms") -> dict[Case, float]:
    """Of steps that are made one after the other, as users make them, or of the time on the device alone (``ms``)."""
    return {key: slower[key][time] / row[time] for key, row in faster.items() if key in slower}


def _least(aim: str, found: dict[Case, float], wanted: float, form: str = "{:.1f} x") -> Target:
    return Target.of(aim, found, min, lambda value: value >= wanted, form)


def _most(aim: str, found: dict[Case, float], wanted: float, form: str = "{:.2f} x") -> Target:
    return Target.of(aim, found, max, lambda value: value <= wanted, form)
