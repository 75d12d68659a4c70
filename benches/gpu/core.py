"""The optimizer side of a SAM step on a GPU, by one form: python -m benches.gpu.core --form NAME --records FILE

A step of each model, base optimizer and type. The form is checked first: a step of it must be that of the definition,
on random numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..contenders import BASES, MASTERS_FLOOR_BYTES
from ..shapes import GPU_MODELS, Shape
from . import records
from .forms import ALL_DTYPES, DTYPES, FORMS, WITH_MASTERS, Form, make_parameters
from .timer import Timer

COPY = "copy"
# Elements that a step reads and writes for each parameter, ascent and descent.
ELEMENTS = {"SGD momentum": 5 + 5, "AdamW": 5 + 7}
# The process ends with this after an error that the GPU does not get over: what would follow could not be trusted.
LOST_DEVICE = 3

Measure = Callable[[Callable[[], object]], dict[str, float]]


def floor_bytes(base: str, dtype: str) -> int:
    """Bytes a parameter that a step has to move."""
    return MASTERS_FLOOR_BYTES[base] if dtype == WITH_MASTERS else ELEMENTS[base] * DTYPES[dtype].itemsize


def first_line(error: Exception) -> str:
    """What a row says of it."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def mistake(form: Form, shapes: list[Shape], base: str, dtype: str, device: torch.device) -> str | None:
    """What is wrong with a step of a form, against the definition.

    In bfloat16 the forms round at different places; there only those with masters are compared, whose steps may differ
    by a rounding of the weights.
    """
    if dtype == "bfloat16":
        dtype = "float32"
    tolerances = {"rtol": 2.0**-7, "atol": 1e-4} if dtype == WITH_MASTERS else {"rtol": 1e-4, "atol": 1e-5}

    def stepped(own: Form, **changes: object) -> list[Tensor]:
        parameters = make_parameters(shapes, dtype, device)
        own.step(parameters, base, dtype, lr=0.1, **changes)()
        return [p.detach() for p in parameters]

    try:
        expected = stepped(Form("sam-kernels"), backend="reference")
        for a, b in zip(stepped(form), expected, strict=True):
            torch.testing.assert_close(a, b, **tolerances)
    except Exception as error:  # of whatever kind: compilers and drivers have their own
        return f"not the definition's step: {first_line(error)}"
    return None


def copy_row(device: torch.device, measure: Measure) -> records.Row:
    """A copy from device to device."""
    count = 2**28 if device.type == "cuda" else 2**20
    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    measured = measure(lambda: target.copy_(source))
    return {"table": COPY, "gb_per_second": 8 * count / measured["ms"] / 1e6, **measured}


def rows(
    name: str,
    models: Sequence[str],
    bases: Sequence[str],
    dtypes: Sequence[str],
    device: torch.device,
    measure: Measure,
) -> Iterator[records.Row]:
    """A form's rows. One that fails is said to have failed, and the next one is tried."""
    form = FORMS[name]
    start = {"table": "core", "form": name}
    reason = form.missing(device)
    if reason is not None:
        yield {**start, "error": reason}
        return
    with form.launching():
        for model in models:
            shapes = GPU_MODELS[model]
            some = [shape for shape in shapes if torch.Size(shape).numel() < 10**7][:30]
            count = sum(torch.Size(shape).numel() for shape in shapes)
            for base in bases:
                for dtype in (own for own in dtypes if own in form.dtypes):
                    row = {**start, "model": model, "parameters": count, "base": base, "dtype": dtype}
                    wrong = mistake(form, some, base, dtype, device)
                    yield row | ({"error": wrong} if wrong else _measured(form, shapes, base, dtype, device, measure))


def _measured(
    form: Form, shapes: list[Shape], base: str, dtype: str, device: torch.device, measure: Measure
) -> records.Row:
    row: records.Row = {}
    try:
        parameters = make_parameters(shapes, dtype, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        row |= measure(form.step(parameters, base, dtype))
        if device.type == "cuda":
            row["extra_bytes"] = torch.cuda.max_memory_allocated(device) - before
        row["gb_per_second"] = floor_bytes(base, dtype) * sum(p.numel() for p in parameters) / row["ms"] / 1e6
    except Exception as error:
        row["error"] = first_line(error)
    return row


def lost(device: torch.device) -> bool:
    """Whether the GPU has had an error that it does not get over; if not, its memory is free again."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=[COPY, *FORMS], required=True)
    parser.add_argument("--records", type=Path, required=True, help="file that rows are added to")
    parser.add_argument("--models", nargs="+", choices=list(GPU_MODELS), default=list(GPU_MODELS))
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--dtypes", nargs="+", choices=ALL_DTYPES, default=ALL_DTYPES)
    parser.add_argument("--seconds", type=float, default=0.15, help="measuring time for each row, about")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    measure = Timer(device, arguments.seconds)
    if arguments.form == COPY:
        records.append(arguments.records, copy_row(device, measure))
        return
    for row in rows(arguments.form, arguments.models, arguments.bases, arguments.dtypes, device, measure):
        records.append(arguments.records, row)
        if lost(device):
            sys.exit(LOST_DEVICE)


if __name__ == "__main__":
    main()
