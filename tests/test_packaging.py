"""A source distribution holds everything that it is built from, wherever it was made."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not here")


def test_source_distribution(tmp_path):
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    # Where there is no nvcc; egg-info goes elsewhere, so that nothing that an earlier build left tells what to take.
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        f"--egg-base={tmp_path}",
        "sdist",
        f"--dist-dir={tmp_path}",
    ]
    environment = {**os.environ, "SAM_KERNELS_CUDA_ARCHS": "none"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
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
