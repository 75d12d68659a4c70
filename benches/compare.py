"""What got slower between two result files by more than the measured noise.

    python -m benches.compare old.json new.json

Compares ratios to a peer of the same run, so that a slower machine is not taken for slower code; with --absolute the
times themselves. The noise of a median is taken from the runs' interquartile ranges. Exit status 1 if something of
ours got slower.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

OURS = "sam-kernels"


class Change(NamedTuple):
    """One benchmark in both files."""

    name: str
    old: float
    new: float
    noise: float  # relative, of new / old

    @property
    def slower(self) -> float:
        """Relative change; positive is slower."""
        return self.new / self.old - 1.0

    @property
    def is_regression(self) -> bool:
        return self.slower > self.noise


def noise_of(stats: dict[str, float]) -> float:
    """Relative standard error of a median, from the interquartile range (1.35 sigma) and the number of rounds."""
    return 1.2533 * stats["iqr"] / 1.349 / math.sqrt(stats["rounds"]) / stats["median"]


def load(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Statistics by group and contender."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in json.loads(path.read_text())["benchmarks"]:
        contender = entry["extra_info"].get("contender") or entry["params"]["contender"]
        groups.setdefault(entry["group"], {})[contender] = entry["stats"]
    return groups


def compare(old: Path, new: Path, yardstick: str | None, factor: float) -> list[Change]:
    """Our entries that both files have.

    Args:
        yardstick: the peer that times are divided by; None compares the times themselves.
        factor: standard errors that count as noise.
    """
    before, after = load(old), load(new)
    changes = []
    for group in before.keys() & after.keys():
        for name in before[group].keys() & after[group].keys():
            if not name.startswith(OURS):
                continue
            pairs = [(side[group][name], side[group].get(yardstick or "")) for side in (before, after)]
            if yardstick is not None and any(peer is None for _, peer in pairs):
                continue
            values, variance = [], 0.0
            for own, peer in pairs:
                values.append(own["median"] / (peer["median"] if peer is not None else 1.0))
                variance += noise_of(own) ** 2 + (noise_of(peer) ** 2 if peer is not None else 0.0)
            changes.append(Change(f"{group}: {name}", *values, factor * math.sqrt(variance)))
    return sorted(changes, key=lambda change: -change.slower)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--yardstick", default="per-tensor SAM", help="the peer that times are divided by")
    parser.add_argument("--absolute", action="store_true", help="compare times, not ratios")
    parser.add_argument("--factor", type=float, default=4.0, help="standard errors that count as noise")
    arguments = parser.parse_args()
    changes = compare(
        arguments.old, arguments.new, None if arguments.absolute else arguments.yardstick, arguments.factor
    )
    if not changes:
        sys.exit("the files have no benchmark of ours in common")
    for change in changes:
        verdict = "SLOWER" if change.is_regression else "faster" if change.slower < -change.noise else "same"
        print(f"{verdict:7} {100 * change.slower:+6.1f} %  (noise {100 * change.noise:.1f} %)  {change.name}")
    if any(change.is_regression for change in changes):
        sys.exit(1)


if __name__ == "__main__":
    main()
