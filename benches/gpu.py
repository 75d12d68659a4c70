"""The optimizer side of a SAM step on a GPU: against the memory's bandwidth, and against peers, in one run.

    python -m benches.gpu --output benches/results/gpu.json

Times are those between two events on the GPU around one eager step, medians after a warm-up; where launching takes
longer than running, they are the host's. Every contender is checked against the others before it is timed, on random
numbers. Percentages are of a device-to-device copy in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sam_kernels
from sam_kernels import cuda, triton

from . import gpu_training
from .contenders import BASES, CONTENDERS, MASTERS_FLOOR_BYTES, RHO, ForeachMasters
from .gpu_training import first_line
from .shapes import GPU_MODELS, Shape

# Elements that a step reads and writes for each parameter, ascent and descent.
ELEMENTS = {"SGD momentum": 5 + 5, "AdamW": 5 + 7}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Weights in bfloat16 that have masters in float32.
WITH_MASTERS = "bfloat16, masters"

# Ours: what a row is called, the backend, and how it launches.
FORMS: list[tuple[str, Any, Any]] = [
    ("sam-kernels", cuda.backend, cuda.Tuning()),
    ("sam-kernels, two launches", cuda.backend, cuda.Tuning(one_launch=False)),
    ("sam-kernels, Triton", triton.backend, triton.Tuning()),
    ("sam-kernels, Triton, one launch", triton.backend, triton.Tuning(one_launch=True)),
]


class Timer:
    """Medians of device time, host time and launches of a call."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def __call__(self, call: Callable[[], object]) -> dict[str, float]:
        for _ in range(3):
            call()
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        rounds = min(100, max(10, int(self.seconds / max(time.perf_counter() - start, 1e-6))))
        device_times, host_times = [], []
        for _ in range(rounds):
            begin = self._event()
            host = time.perf_counter()
            call()
            host_times.append(time.perf_counter() - host)
            end = self._event()
            self._wait()
            device_times.append(self._between(begin, end))
        return {
            "ms": 1e3 * statistics.median(device_times),
            "spread_ms": 1e3 * (max(device_times) - min(device_times)),
            "host_us": 1e6 * statistics.median(host_times),
            "rounds": rounds,
            "launches": self._launches(call),
        }

    def _event(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return end - begin if self.device.type != "cuda" else begin.elapsed_time(end) / 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _launches(self, call: Callable[[], object]) -> int:
        if self.device.type != "cuda":
            return 0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def floor_bytes(base: str, dtype: str) -> int:
    """Bytes a parameter that a step has to move."""
    return MASTERS_FLOOR_BYTES[base] if dtype == WITH_MASTERS else ELEMENTS[base] * DTYPES[dtype].itemsize


def make_parameters(shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random parameters with random gradients; the same on every call."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=generator, device=device).to(dtype)) for s in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, device=device).to(dtype)
    return parameters


def step_of(contender: str, parameters: list[Tensor], base: str, **changes: Any) -> Callable[[], object]:
    """The optimizer side of a step: both moves."""
    cls, settings = BASES[base]
    settings = {**settings, **changes}
    if contender == "foreach masters":
        optimizer: Any = ForeachMasters(parameters, cls, RHO, **settings)
    elif contender == "compiled SAM":
        optimizer = CONTENDERS["foreach SAM"](parameters, cls, RHO, False, **settings)
        optimizer.first_step = torch.compile(optimizer.first_step)
    else:
        optimizer = CONTENDERS[contender](parameters, cls, RHO, False, **settings)

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def forms() -> list[tuple[str, Any, Any]]:
    """Our backends that can run here; on a CPU, to try this program out, the one that is chosen there."""
    return [form for form in FORMS if form[1].unavailable_reason() is None] or [("sam-kernels", None, None)]


def choice_of(backend: Any) -> dict[str, Any]:
    return {} if backend is None else {"backend": backend.name}


def peers(compiled: bool) -> Iterator[str]:
    """Those that are installed. Compiling takes a minute for each list of tensors."""
    yield from ("per-tensor SAM", "foreach SAM")
    try:
        import pytorch_optimizer  # noqa: F401

        yield "pytorch-optimizer"
    except ImportError:
        pass
    if compiled:
        yield "compiled SAM"


def wrong(shapes: list[Shape], base: str, device: torch.device, masters: bool) -> dict[str, str]:
    """Of the contenders that do not make the reference's step, what they do instead.

    Those with masters may differ from it by a rounding of the weights.
    """
    dtype, more = (torch.bfloat16, {"master_weights": True}) if masters else (torch.float32, {})
    tolerances = {"rtol": 2.0**-7, "atol": 1e-4} if masters else {"rtol": 1e-4, "atol": 1e-5}
    rows = [(name, "sam-kernels", backend, tuning) for name, backend, tuning in forms()]
    rows += [(name, name, None, None) for name in (["foreach masters"] if masters else peers(compiled=False))]

    def stepped(contender: str, **changes: Any) -> list[Tensor]:
        parameters = make_parameters(shapes, dtype, device)
        changes |= more if contender == "sam-kernels" else {}
        step_of(contender, parameters, base, lr=0.1, **changes)()
        return [p.detach() for p in parameters]

    expected = stepped("sam-kernels", backend="reference")
    found = {}
    for name, contender, backend, tuning in rows:
        try:
            with tuned(backend, tuning):
                got = stepped(contender, **choice_of(backend))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, **tolerances)
        except Exception as error:  # what is wrong with one contender must not cost the others their turn
            found[name] = f"not the reference's step: {first_line(error)}"
    return found


@contextmanager
def tuned(backend: Any, tuning: Any) -> Iterator[None]:
    """Within it, a backend of ours launches so."""
    if backend is None:
        yield
        return
    before = backend.tuning
    backend.tuning = tuning
    try:
        yield
    finally:
        backend.tuning = before


def copy_bandwidth(timer: Timer, count: int) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source, target = torch.randn(count, device=timer.device), torch.empty(count, device=timer.device)
    return 8 * count / (timer(lambda: target.copy_(source))["ms"] / 1e3)


def rows_of_model(model: str, timer: Timer, copy: float) -> Iterator[dict[str, Any]]:
    """Every contender on one model, base and type."""
    shapes = GPU_MODELS[model]
    count = sum(torch.Size(shape).numel() for shape in shapes)
    for base in BASES:
        some = [shape for shape in shapes if torch.Size(shape).numel() < 10**7][:30]
        errors = {masters: wrong(some, base, timer.device, masters) for masters in (False, True)}
        for dtype_name in (*DTYPES, WITH_MASTERS):
            if count > 4e9 and dtype_name != "bfloat16":
                continue  # 128 GB of weights, gradients, copies and state at the least
            dtype = DTYPES.get(dtype_name, torch.bfloat16)
            more = {"master_weights": True} if dtype_name == WITH_MASTERS else {}
            floor = floor_bytes(base, dtype_name) * count
            compiled = (model, base, dtype_name) == ("resnet50", "SGD momentum", "float32")
            rows = [(name, "sam-kernels", backend, tuning) for name, backend, tuning in forms()]
            others = ["foreach masters"] if more else peers(compiled)
            rows += [(name, name, None, None) for name in others]
            for name, contender, backend, tuning in rows:
                row = {"model": model, "parameters": count, "base": base, "dtype": dtype_name, "contender": name}
                try:
                    if name in errors[bool(more)]:
                        raise RuntimeError(errors[bool(more)][name])
                    parameters = make_parameters(shapes, dtype, timer.device)
                    before = memory_mark(timer.device)
                    changes = {**choice_of(backend), **more} if contender == "sam-kernels" else {}
                    with tuned(backend, tuning):
                        row |= timer(step_of(contender, parameters, base, **changes))
                    row["extra_bytes"] = memory_peak(timer.device) - before
                    row["gb_per_second"] = floor / row["ms"] / 1e6
                    row["percent_of_copy"] = 100 * floor / (row["ms"] / 1e3) / copy
                except Exception as error:  # of whatever kind: compilers and drivers have their own
                    row["error"] = first_line(error)
                parameters = None
                if timer.device.type == "cuda":
                    torch.cuda.empty_cache()
                yield row


def memory_mark(device: torch.device) -> int:
    """What is allocated now; the peak is counted from here on."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def memory_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def sweeps(model: str, timer: Timer, copy: float) -> Iterator[dict[str, Any]]:
    """Chunk size, threads and blocks of our own kernels."""
    shapes = GPU_MODELS[model]
    count = sum(torch.Size(shape).numel() for shape in shapes)
    tunings: list[tuple[Any, Any]] = [
        *((cuda.backend, cuda.Tuning(chunk_size=size)) for size in (4096, 8192, 16384, 32768, 65536 - 8)),
        *((cuda.backend, cuda.Tuning(threads=threads)) for threads in (128, 256, 384)),
        *((cuda.backend, cuda.Tuning(blocks_per_multiprocessor=blocks)) for blocks in (1, 2, 3)),
        *((triton.backend, triton.Tuning(block=block)) for block in (1024, 2048, 4096, 8192)),
        *((triton.backend, triton.Tuning(threads=threads)) for threads in (128, 512)),
    ]
    parameters = make_parameters(shapes, torch.float32, timer.device)
    for backend, tuning in tunings:
        if backend.unavailable_reason() is not None:
            continue
        row: dict[str, Any] = {"model": model, "sweep": f"{backend.name} {tuning!r}"}
        try:
            with tuned(backend, tuning):
                row |= timer(step_of("sam-kernels", parameters, "SGD momentum", backend=backend.name))
            row["percent_of_copy"] = 100 * 40 * count / (row["ms"] / 1e3) / copy
        except Exception as error:  # a size that does not fit this GPU
            row["error"] = first_line(error)
        yield row


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Optimizer side of a SAM step")
    for column in ("model", "base", "type", "contender", "ms", "GB/s", "of copy", "launches", "host µs", "MB", "ratio"):
        table.add_column(column, justify="left" if column in ("model", "base", "type", "contender") else "right")
    ours: dict[tuple[str, str, str], float] = {}
    for row in rows:
        key = (row["model"], row["base"], row["dtype"])
        if row["contender"] == "sam-kernels" and "ms" in row:
            ours[key] = row["ms"]
        if "ms" not in row:
            table.add_row(*key, row["contender"], row.get("error", ""))
            continue
        table.add_row(
            *key,
            row["contender"],
            f"{row['ms']:.3f}",
            f"{row['gb_per_second']:.0f}",
            f"{row['percent_of_copy']:.0f} %",
            str(row["launches"]),
            f"{row['host_us']:.0f}",
            f"{row['extra_bytes'] / 1e6:.0f}",
            f"{row['ms'] / ours[key]:.1f}" if key in ours else "",
        )
    console.print(table)


def show_training(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Whole training steps")
    for column in ("network", "base", "batch", "step", "ms", "samples/s", "launches", "host µs"):
        table.add_column(column, justify="left" if column in ("network", "base", "step") else "right")
    for row in rows:
        key = (row["network"], row["base"], str(row["batch"]), row["step"])
        if "ms" not in row:
            table.add_row(*key, row["error"])
            continue
        measured = (
            f"{row['ms']:.3f}",
            f"{row['samples_per_second']:.0f}",
            str(row["launches"]),
            f"{row['host_us']:.0f}",
        )
        table.add_row(*key, *measured)
    console.print(table)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on, and nothing that names a host."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python -m benches.gpu", *sys.argv[1:]]),
        "backends": {name: status.detail for name, status in sam_kernels.backends().items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--models", nargs="+", choices=list(GPU_MODELS), default=list(GPU_MODELS))
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time for each row")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which no further model is begun")
    parser.add_argument("--training-limit", type=float, default=180.0, help="the same for whole training steps")
    parser.add_argument("--only", choices=["optimizer", "training"], help="one of the two parts alone")
    parser.add_argument("--no-sweeps", action="store_true")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "there is no CUDA device\n")

    started = time.perf_counter()
    timer = Timer(device, arguments.seconds)
    copy = copy_bandwidth(timer, 2**28 if device.type == "cuda" else 2**22)
    console = Console(width=150)
    console.print(f"copy on the device: {copy / 1e9:.0f} GB/s")
    results: dict[str, Any] = {"machine": machine(device), "copy_gb_per_second": copy / 1e9}
    results |= {"rows": [], "sweeps": [], "training": []}

    def save() -> None:
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")

    def in_time(rows: Iterator[dict[str, Any]], more: float = 0.0) -> Iterator[dict[str, Any]]:
        while time.perf_counter() - started < arguments.limit + more and (row := next(rows, None)) is not None:
            yield row

    for model in [] if arguments.only == "training" else arguments.models:
        for row in in_time(rows_of_model(model, timer, copy)):
            results["rows"].append(row)
            save()
    if not arguments.no_sweeps and arguments.only != "training":
        for model in [m for m in ("resnet50", "gpt2") if m in arguments.models]:
            results["sweeps"] += in_time(sweeps(model, timer, copy), more=40.0)
    save()
    if arguments.only != "optimizer":
        started = time.perf_counter() - arguments.limit + arguments.training_limit
        for row in in_time(gpu_training.rows(timer, device)):
            results["training"].append(row)
            save()
    if results["rows"]:
        show(results["rows"], console)
    if results["training"]:
        show_training(results["training"], console)
    for row in results["sweeps"]:
        outcome = row.get("error") or f"{row['ms']:.3f} ms  {row['percent_of_copy']:.0f} %"
        console.print(f"{row['model']}  {row['sweep']}  {outcome}")


if __name__ == "__main__":
    main()
