"""What nvcc makes of the kernels: no spills, no stack frames, no more registers than the launch bounds leave."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .shim import ROOT

# 65,536 registers of a multiprocessor for two blocks of 512 threads.
REGISTERS = 65536 // (2 * 512)
KERNELS = {
    "gram_kernel",
    "ascent_kernel",
    "perturb_kernel",
    "restore_kernel",
    "combine_kernel",
    *(f"{kind}_kernel_{base}" for kind in ("descent", "rule_descent") for base in ("sgd", "adam")),
}


@pytest.fixture(scope="module")
def build_cuda():
    path = ROOT / "csrc/build_cuda.py"
    if not path.exists():
        pytest.skip("the sources of the kernels are not here")
    specification = importlib.util.spec_from_file_location("build_cuda", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["build_cuda"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toolkit(build_cuda):
    try:
        return build_cuda.find_toolkit()
    except build_cuda.NoCudaError as reason:
        pytest.skip(str(reason))


def test_resources(build_cuda, toolkit, monkeypatch):
    """For every kernel and every compute capability that is built by default."""
    monkeypatch.delenv("SAM_KERNELS_CUDA_ARCHS", raising=False)
    archs = build_cuda.wanted_archs(toolkit)
    report = build_cuda.compile_kernels(toolkit, archs, ROOT / "build").report
    entries = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    seen = set()
    for name, arch, stack, stores, loads, registers in entries:
        kernel = next(k for k in sorted(KERNELS, key=len, reverse=True) if k in name)
        seen.add((kernel, arch))
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), f"{kernel} for sm_{arch} spills"
        assert int(registers) <= REGISTERS, f"{kernel} for sm_{arch} takes {registers} registers"
    assert seen == {(kernel, arch) for kernel in KERNELS for arch in archs}


def test_vector_accesses(toolkit, tmp_path):
    """The loops over vectors read and write 16 bytes at a time, past the first-level cache."""
    for source, least in (("gram", 20), ("elementwise", 10), ("descent_sgd", 20), ("descent_adam", 20)):
        ptx = tmp_path / f"{source}.ptx"
        command = [toolkit.nvcc, "-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", "-ptx"]
        subprocess.run([*command, str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(ptx)], check=True)
        text = ptx.read_text()
        assert len(re.findall(r"ld\.global\.c[sg]\.v4\.u32", text)) >= least
        assert source == "gram" or len(re.findall(r"st\.global\.cs\.v4\.u32", text)) >= 6
        assert ".local" not in text
        assert not re.search(r"\b(ld|st)\.(f|b|u)\d+", text), "a generic access: its address space is not known"


def test_choice_of_architectures(build_cuda, monkeypatch):
    toolkit = build_cuda.Toolkit("nvcc", (13, 0), frozenset({"75", "80", "90", "100", "120"}), Path())
    for text, wanted in (
        ("", ["80", "90", "100"]),
        ("9.0", ["90"]),
        ("120;sm_80", ["80", "120"]),
        ("80, 90", ["80", "90"]),
    ):
        monkeypatch.setenv("SAM_KERNELS_CUDA_ARCHS", text)
        assert build_cuda.wanted_archs(toolkit) == wanted
    monkeypatch.setenv("SAM_KERNELS_CUDA_ARCHS", "80;61")
    with pytest.raises(ValueError, match="knows 75, 80, 90, 100, 120"):
        build_cuda.wanted_archs(toolkit)
    monkeypatch.setenv("SAM_KERNELS_CUDA_ARCHS", "none")
    with pytest.raises(build_cuda.NoCudaError):
        build_cuda.wanted_archs(toolkit)


def test_a_missing_toolkit_says_so(build_cuda, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build_cuda.NoCudaError, match="nvcc is not on the PATH"):
        build_cuda.find_toolkit()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build_cuda.NoCudaError, match="does not run"):
        build_cuda.find_toolkit()


def test_the_extension_loads_where_there_is_no_driver():
    cuda = pytest.importorskip("sam_kernels._cuda")
    assert isinstance(cuda.why_unusable(0), str)
