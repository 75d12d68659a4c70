"""A source distribution holds everything that it is built from, wherever it was made; and builds without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not here")


def run_setup(tmp_path, *commands, **environment):
    """Without nvcc; egg-info goes elsewhere, so that nothing that an earlier build left tells what to take."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}", *commands]
    environment = {**os.environ, "SAM_KERNELS_CUDA_ARCHS": "none", **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_source_distribution(tmp_path):
    run = run_setup(tmp_path, "sdist", f"--dist-dir={tmp_path}")
    assert run.returncode == 0, run.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        found = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    folders = ("csrc", "sam_kernels", "python/sam_optim")
    kinds = {".py", ".typed", ".h", ".inl", ".cpp", ".cu", ".cuh"}
    wanted = {str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md"}
    assert "csrc/build_cuda.py" in wanted and "csrc/cuda/gram.cu" in wanted
    assert not wanted - found
    assert not [name for name in found if name.endswith((".so", ".pyc"))]


BUILDS = ("build", "--build-base={0}/build", "bdist_wheel", "--dist-dir={0}")


def test_a_missing_compiler_is_said_with_what_to_do(tmp_path):
    nothing = str(tmp_path / "no-compiler")
    commands = [command.format(tmp_path) for command in BUILDS]
    run = run_setup(tmp_path, *commands, CC=nothing, CXX=nothing)
    assert run.returncode != 0
    assert "SAM_KERNELS_NO_EXTENSIONS=1" in run.stderr and "Traceback" not in run.stderr


# For a program that is to import what was built, not the sources that are installed as editable.
NOT_THE_SOURCES = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
"""


def test_without_extensions(tmp_path):
    nothing = str(tmp_path / "no-compiler")
    commands = [command.format(tmp_path) for command in BUILDS]
    run = run_setup(tmp_path, *commands, CC=nothing, CXX=nothing, SAM_KERNELS_NO_EXTENSIONS="1")
    assert run.returncode == 0, run.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert "sam_optim/__init__.py" in names and not [name for name in names if name.endswith(".so")]
    program = """
import torch, sam_kernels, sam_optim
assert not sam_kernels.backends()["cpu"].available
weight = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
optimizer = sam_optim.SAM([weight], torch.optim.SGD, rho=0.5, lr=0.1)
for move in (optimizer.first_step, optimizer.second_step):
    (0.5 * torch.tensor([1.0, 4.0]) * weight**2).sum().backward()
    move(zero_grad=True)
torch.testing.assert_close(weight.detach(), torch.tensor([2.67, 0.44]))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    program = NOT_THE_SOURCES + program
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


# Stand in for a compiler, which writes nothing into what it is asked for, and for nvcc.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then : > "$2"; fi
    shift
done
"""
NVCC = """#!/bin/sh
case "$*" in
    --version) echo "release 99.9" ;;  # of none that is: what it makes is not used again by a real one
    --list-gpu-code) echo sm_90 ;;
    *--dryrun*) echo "#$ TOP={home}" ;;
    *) echo "error: this does not compile"; exit 1 ;;
esac
"""


@pytest.fixture
def build(tmp_path):
    """Builds the extensions with stand-ins for the compilers; the folder that has them and the build's outcome."""
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    for path, text in ((home / "bin/nvcc", NVCC.format(home=home)), (tmp_path / "compiler", COMPILER)):
        path.write_text(text)
        path.chmod(0o755)

    def run(archs=""):
        compiler = str(tmp_path / "compiler")
        environment = {"CUDA_HOME": str(home), "SAM_KERNELS_CUDA_ARCHS": archs, "CC": compiler, "CXX": compiler}
        folder = tmp_path / "built"
        commands = ["build_ext", f"--build-lib={folder}", f"--build-temp={tmp_path / 'objects'}"]
        return folder, run_setup(tmp_path, *commands, **environment)

    return run


def test_a_build_without_cuda_says_why(build, tmp_path):
    """And what it has built repeats it: pip shows nothing of a build that succeeds."""
    folder, run = build()
    assert run.returncode == 0, run.stderr
    assert "has no libcudart_static.a" in run.stderr
    [said] = folder.rglob("_cuda_missing.txt")
    assert said.parent.name == "sam_kernels" and "has no libcudart_static.a" in said.read_text()
    for empty in folder.rglob("*.so"):
        empty.unlink()
    ignored = shutil.ignore_patterns("*.so", said.name)
    shutil.copytree(ROOT / "sam_kernels", folder / "sam_kernels", ignore=ignored, dirs_exist_ok=True)
    program = f"{NOT_THE_SOURCES}import sam_kernels; print(sam_kernels.backends()['cuda'].detail)"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    run = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, env=environment)
    assert "built without it: the toolkit of" in run.stdout and "libcudart_static.a" in run.stdout, run.stderr


def test_a_failing_compile_of_the_kernels_says_so(build, tmp_path):
    (tmp_path / "toolkit/lib64").mkdir()
    (tmp_path / "toolkit/lib64/libcudart_static.a").touch()
    _, run = build()
    assert run.returncode != 0
    assert "this does not compile" in run.stderr and "SAM_KERNELS_CUDA_ARCHS=none" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_build_with_cuda_takes_back_what_one_without_has_said(build, tmp_path):
    (tmp_path / "toolkit/lib64").mkdir()
    (tmp_path / "toolkit/lib64/libcudart_static.a").touch()
    folder, run = build(archs="none")
    [said] = folder.rglob("_cuda_missing.txt")
    assert said.read_text() == "SAM_KERNELS_CUDA_ARCHS is none\n"
    nvcc = tmp_path / "toolkit/bin/nvcc"
    nvcc.write_text(nvcc.read_text().replace('echo "error: this does not compile"; exit 1', COMPILER.split("\n", 1)[1]))
    folder, run = build()
    assert run.returncode == 0, run.stderr
    assert not said.exists()
