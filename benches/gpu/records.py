"""Rows of results as lines of JSON, on disk the moment they are known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Files of a folder of results.
RESULTS, TESTS, STAGES, LOG = "results.jsonl", "tests.jsonl", "stages.jsonl", "log.txt"

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Adds a row: whoever is killed right after this has told it."""
    line = (json.dumps(row) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)  # at once, so that no other line can come to stand within it
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path) -> list[Row]:
    """The rows of a file, none if it is not there; without what was torn off in the middle."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
