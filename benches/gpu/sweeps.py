"""Other ways to launch our kernels than those we have chosen: python -m benches.gpu.sweeps --records FILE"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from sam_kernels import cuda, triton

from ..shapes import GPU_MODELS
from . import records
from .core import LOST_DEVICE, Measure, first_line, floor_bytes, lost
from .forms import Form, make_parameters
from .timer import Timer

CUDA_TUNINGS = [
    *(cuda.Tuning(chunk_size=size) for size in (4096, 8192, 16384, 32768, 65536 - 8)),
    *(cuda.Tuning(threads=threads) for threads in (128, 256, 384)),
    *(cuda.Tuning(blocks_per_multiprocessor=blocks) for blocks in (1, 2, 3)),
]
# A cooperative launch's programs are all resident: threads times programs is what hides the memory's latency.
TRITON_TUNINGS = [
    *(triton.Tuning(block=block) for block in (1024, 2048, 4096, 8192)),
    *(triton.Tuning(threads=threads) for threads in (128, 512)),
    *(
        triton.Tuning(block=block, threads=threads, programs_per_multiprocessor=programs, one_launch=True)
        for block in (2048, 4096)
        for threads, programs in ((256, 2), (256, 4), (256, 6), (256, 8), (512, 2), (512, 4), (128, 8), (128, 16))
    ),
]
FORMS = [Form("sam-kernels", cuda.backend, tuning) for tuning in CUDA_TUNINGS] + [
    Form("sam-kernels", triton.backend, tuning) for tuning in TRITON_TUNINGS
]


def rows(models: Sequence[str], dtypes: Sequence[str], device: torch.device, measure: Measure) -> Iterator[records.Row]:
    """A step with SGD of each."""
    base = "SGD momentum"
    for model in models:
        for dtype in dtypes:
            parameters = make_parameters(GPU_MODELS[model], dtype, device)
            count = sum(p.numel() for p in parameters)
            for form in (form for form in FORMS if form.missing(device) is None):
                tuning = f"{form.backend.name} {form.tuning!r}"
                row = {"table": "sweeps", "model": model, "base": base, "dtype": dtype, "tuning": tuning}
                try:
                    with form.launching():
                        row |= measure(form.step(parameters, base, dtype))
                    row["gb_per_second"] = floor_bytes(base, dtype) * count / row["ms"] / 1e6
                except Exception as error:  # a size that does not fit this GPU
                    row["error"] = first_line(error)
                yield row


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True, help="file that rows are added to")
    parser.add_argument("--models", nargs="+", choices=list(GPU_MODELS), default=["vit_b16"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time for each row, about")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    for row in rows(arguments.models, arguments.dtypes, device, Timer(device, arguments.seconds)):
        records.append(arguments.records, row)
        if lost(device):
            sys.exit(LOST_DEVICE)


if __name__ == "__main__":
    main()
