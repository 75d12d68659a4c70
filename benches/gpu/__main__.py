"""One visit to a GPU, the most valuable first: python -m benches.gpu

Part A: the extension, every operation once, and the core table. Part B: sanitizers, tests, whole training steps,
sweeps. Each ends in under five minutes. Results go to the folder that $OUT names, by default benches/results/gpu, and
are added to what is there; `python -m benches.report` makes tables of what it finds.

With `--device cpu` the same is rehearsed without a GPU, by the kernels for the CPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Asked for when OpenMP is loaded, with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Stages are forks of this process, which have it then; optimizers import it.
import torch._dynamo  # noqa: F401

from ..shapes import GPU_MODELS
from . import records
from .stages import Command, Program, Stages

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {"cuda": ROOT / "benches/results/gpu", "cpu": ROOT / "build/gpu-rehearsal"}
# Of this tree's packages, whether or not they are installed.
FOLDERS = [str(ROOT), str(ROOT / "python")]

CORE_MODELS = ("resnet50", "vit_b16", "gpt2", "1.24 B")
# Of peers that are slow, these say enough.
FEW_MODELS = ("resnet50", "gpt2")
REHEARSED_MODELS = ("161 x 10",)


class Visit:
    """The stages of both parts.

    Args:
        device: "cuda", or "cpu" for a rehearsal.
        folder: for results.
        models: of the core table.
        tests: files and folders of tests.
        seconds: for each part.
        commit: that is measured, where git cannot tell it.
    """

    def __init__(
        self, device: str, folder: Path, models: Sequence[str], tests: Sequence[str], seconds: float, commit: str | None
    ) -> None:
        self._device, self._on_gpu, self._folder = device, device == "cuda", folder
        self._models, self._tests, self._commit, self._seconds = models, tests, commit, seconds
        self._stages: Stages

    def part_a(self) -> None:
        self._stages = Stages(self._folder, self._seconds)
        self._stages.run("driver", 20, Command(["nvidia-smi"]))
        self._stages.run("compiler", 10, Command(["nvcc", "--version"]))
        if not self._run("machine", 40, "machine", *self._described("A")):
            self._stages.run("build", 90, Command([sys.executable, "setup.py", "build_ext", "--inplace"]))
            self._run("machine, after the build", 40, "machine", *self._described("A"))
        self._stages.run("every kernel", 60, self._every_kernel())
        self._core("copy", 15)
        self._core("sam-kernels", 50)
        self._core("foreach SAM", 30)
        self._run("launches", 30, "launches", "--models", self._models[0])
        self._core("sam-kernels, Triton", 45)
        self._core("sam-kernels, two launches", 30)
        self._core("sam-kernels, Triton, one launch", 35)
        self._core("foreach masters", 20)
        few = [model for model in self._models if model in FEW_MODELS] or self._models[:1]
        self._core("per-tensor SAM", 20, few)
        self._core("pytorch-optimizer", 20, few)

    def part_b(self) -> None:
        self._stages = Stages(self._folder, self._seconds)
        self._run("machine", 40, "machine", *self._described("B"))
        self._sanitize("memcheck", 50)
        self._test("tests", 150, "gpu and not alone", "--in-parallel")
        self._test("tests that need the GPU for themselves", 60, "gpu and alone")
        some = [] if self._on_gpu else ["--networks", "MLP", "--steps", "SAM", "SAM, captured"]
        self._run("training", 60, "training", *some, *self._briefly())
        self._run("sweeps", 60, "sweeps", "--models", self._models[min(1, len(self._models) - 1)], *self._briefly())
        self._sanitize("racecheck", 50)
        if self._on_gpu:  # what takes long, or much memory
            self._core("compiled SAM", 60, self._models[:1])
            self._core("sam-kernels", 60, ["1000 small", "8 B"], "--dtypes", "bfloat16")

    def _run(self, name: str, limit: float, module: str, *words: str) -> bool:
        """A program of this package that measures something."""
        common = ["--records", str(self._folder / records.RESULTS), "--device", self._device]
        return self._stages.run(name, limit, Program(f"benches.gpu.{module}", [*words, *common]))

    def _core(self, form: str, limit: float, models: Sequence[str] = (), *words: str) -> None:
        chosen = ["--models", *(models or self._models), *self._briefly()]
        self._run(f"core: {form}", limit, "core", "--form", form, *chosen, *words)

    def _briefly(self) -> list[str]:
        """In a rehearsal nothing is measured."""
        return [] if self._on_gpu else ["--seconds", "0"]

    def _described(self, part: str) -> list[str]:
        words = ["--command", f"python -m benches.gpu --part {part}"]
        return [*words, "--commit", self._commit] if self._commit else words

    def _every_kernel(self) -> Program:
        return Program("tests.cuda.sanitize", ["--device", self._device])

    def _sanitize(self, tool: str, limit: float) -> None:
        program = self._every_kernel()
        if not self._on_gpu:
            self._stages.run(tool, limit, program)
            return
        words = ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=samk", "--error-exitcode", "1"]
        if tool == "memcheck":
            words += ["--report-api-errors", "no"]  # torch asks for what may fail
        self._stages.run(tool, limit, Command([*words, sys.executable, "-m", program.module, *program.arguments]))

    def _test(self, name: str, limit: float, marked: str, *options: str) -> None:
        words = [*options, "--records", str(self._folder / records.TESTS), "--", "-m", marked, *self._tests]
        self._stages.run(name, limit, Program("benches.gpu.tests", words))


def own_capability() -> str | None:
    """The GPU's compute capability, by the driver: this process does not touch the GPU."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["A", "B", "AB"], default="AB")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--models", nargs="+", choices=list(GPU_MODELS), help="of the core table")
    parser.add_argument("--tests", nargs="+", default=["tests/kernels", "tests/optim"], help="files and folders")
    parser.add_argument("--seconds", type=float, default=285.0, help="for each part")
    parser.add_argument("--commit", help="where git cannot tell it")
    arguments = parser.parse_args(words)
    models = arguments.models or (CORE_MODELS if arguments.device == "cuda" else REHEARSED_MODELS)
    folder = Path(os.environ.get("OUT") or RESULTS[arguments.device]).resolve()
    os.chdir(ROOT)
    sys.path[:0] = FOLDERS
    os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    # The profiler otherwise ends CUPTI after each profile, and graphs that are replayed later crash.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    if arguments.device == "cuda" and (capability := own_capability()):
        os.environ.setdefault("SAM_KERNELS_CUDA_ARCHS", capability)
    visit = Visit(arguments.device, folder, models, arguments.tests, arguments.seconds, arguments.commit)
    if "A" in arguments.part:
        visit.part_a()
    if "B" in arguments.part:
        visit.part_b()


if __name__ == "__main__":
    main()
