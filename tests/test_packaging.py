"""A source distribution holds everything that it is built from, wherever it was made; and builds without a compiler."""

from __future__ import annotations

import os
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
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in str(finder)]  # of the sources
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
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
