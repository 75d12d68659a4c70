"""What nvcc makes of the kernels: no spills, no stack frames, no more registers than the launch bounds leave."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from .shim import ROOT
from .shim import build_cuda as load_build_cuda

# 65,536 registers of a multiprocessor for two blocks of 512 threads.
REGISTERS = 65536 // (2 * 512)
KERNELS = {"gram_kernel", "ascent_kernel", "perturb_kernel", "restore_kernel", "combine_kernel"}
OF_EACH_BASE = {"descent_kernel", "rule_descent_kernel"}


@pytest.fixture(scope="module")
def build_cuda():
    return load_build_cuda()


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
    bases = {unit.base for unit in build_cuda.units() if unit.base is not None}
    assert bases
    seen = set()
    for name, arch, stack, stores, loads, registers in entries:
        kernel = max((k for k in KERNELS | OF_EACH_BASE if k in name), key=len)
        base = next((b for b in bases if f"{len(b)}{b}E" in name), None)  # as names are mangled
        seen.add((kernel, base, arch))
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), f"{kernel}<{base}> for sm_{arch} spills"
        assert int(registers) <= REGISTERS, f"{kernel}<{base}> for sm_{arch} takes {registers} registers"
    wanted = {(kernel, None) for kernel in KERNELS} | {(kernel, base) for kernel in OF_EACH_BASE for base in bases}
    assert seen == {(*kernel, arch) for kernel in wanted for arch in archs}


def test_vector_accesses(build_cuda, toolkit, tmp_path):
    """The loops over vectors read and write 16 bytes at a time, past the first-level cache."""
    for unit in build_cuda.units():
        if unit.name == "launch":
            continue
        source, least = unit.name, 10 if unit.name == "elementwise" else 20
        ptx = tmp_path / f"{source}.ptx"
        command = [toolkit.nvcc, "-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", "-ptx", *unit.flags]
        subprocess.run([*command, str(unit.source), "-o", str(ptx)], check=True)
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
