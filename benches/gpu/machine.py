"""What results depend on: python -m benches.gpu.machine --records FILE

Ends with an error if the kernels for the device cannot be used.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

import sam_kernels

from . import records


def commit_of(given: str | None) -> str:
    """The commit that is measured: as given, or as git knows it, where there are git and a repository."""
    if given:
        return given
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def describe(device: torch.device, commit: str | None, command: str) -> records.Row:
    """A row with nothing that names a host."""
    row: records.Row = {
        "table": "machine",
        "device": platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit_of(commit),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "backends": {name: status.detail for name, status in sam_kernels.backends().items()},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return row


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True, help="file that the row is added to")
    parser.add_argument("--commit", help="where git cannot tell it")
    parser.add_argument("--command", default="python -m benches.gpu.machine", help="what was asked for")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    row = describe(device, arguments.commit, arguments.command)
    records.append(arguments.records, row)
    print(row)
    status = sam_kernels.backends()["cuda" if device.type == "cuda" else "cpu"]
    if not status.available:
        sys.exit(status.detail)


if __name__ == "__main__":
    main()
