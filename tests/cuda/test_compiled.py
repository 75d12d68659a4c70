"""What nvcc makes of the kernels: no spills, no stack frames, no more registers than the launch bounds leave."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from sam_kernels.bases import BASES

from .shim import ROOT
from .shim import build_cuda as load_build_cuda

# 65,536 registers of a multiprocessor for two blocks of 512 threads.
REGISTERS = 65536 // (2 * 512)
# By what is compiled together: the bases' descents one by one, since each takes half a minute.
KERNELS = {
    "gram": {"gram_kernel", "ascent_kernel"},
    "elementwise": {"perturb_kernel", "restore_kernel", "combine_kernel"},
    **{f"descent_{base.code}": {"descent_kernel", "rule_descent_kernel"} for base in BASES},
}
by_unit = pytest.mark.parametrize("unit", KERNELS)


@pytest.fixture(scope="module")
def build_cuda():
    return load_build_cuda()


@pytest.fixture(scope="module")
def toolkit(build_cuda):
    try:
        return build_cuda.find_toolkit()
    except build_cuda.NoCudaError as reason:
        pytest.skip(str(reason))


def unit_named(build_cuda, name):
    return next(unit for unit in build_cuda.units() if unit.name == name)


def test_all_that_is_compiled_is_looked_at(build_cuda):
    assert {unit.name for unit in build_cuda.units()} == {*KERNELS, "launch"}


@by_unit
def test_resources(build_cuda, toolkit, monkeypatch, unit):
    """For every kernel and every compute capability that is built by default."""
    monkeypatch.delenv("SAM_KERNELS_CUDA_ARCHS", raising=False)
    archs = build_cuda.wanted_archs(toolkit)
    report = build_cuda.compile_kernels(toolkit, archs, ROOT / "build", [unit_named(build_cuda, unit)]).report
    entries = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    seen = set()
    for name, arch, stack, stores, loads, registers in entries:
        kernel = max((kernel for kernel in KERNELS[unit] if kernel in name), key=len)
        seen.add((kernel, arch))
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), f"{kernel} for sm_{arch} spills"
        assert int(registers) <= REGISTERS, f"{kernel} for sm_{arch} takes {registers} registers"
    assert seen == {(kernel, arch) for kernel in KERNELS[unit] for arch in archs}


@by_unit
def test_vector_accesses(build_cuda, toolkit, tmp_path, unit):
    """The loops over vectors read and write 16 bytes at a time, past the first-level cache."""
    own, ptx = unit_named(build_cuda, unit), tmp_path / f"{unit}.ptx"
    command = [toolkit.nvcc, "-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", "-ptx", *own.flags]
    subprocess.run([*command, str(own.source), "-o", str(ptx)], check=True)
    text = ptx.read_text()
    assert len(re.findall(r"ld\.global\.c[sg]\.v4\.u32", text)) >= (10 if unit == "elementwise" else 20)
    assert unit == "gram" or len(re.findall(r"st\.global\.cs\.v4\.u32", text)) >= 6
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
