"""The sanitizers' program on the stand-in that counts lines: python -m tests.cuda.covered"""

from __future__ import annotations

import torch

from ..targets import Target
from .sanitize import run_all
from .shim import ShimBackend

SIZES = [0, 7, 700, 2049]


def main() -> None:
    torch.set_num_threads(1)
    shim = ShimBackend(counts_lines=True)
    from sam_kernels.registry import _BACKENDS

    _BACKENDS[shim.name] = shim
    failed = run_all(Target(shim, torch.device("cpu"), SIZES))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
