"""A visit to a GPU, rehearsed: every stage runs, and one that fails or hangs costs no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("benches.gpu")
from benches.gpu import records, stages
from benches.gpu.stages import Command, Program, Stages

# A stage is a fork, of which Python 3.12 warns where there are threads. Here it computes nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable

TESTS = """
import pytest

pytestmark = pytest.mark.gpu

def test_passes():
    pass

def test_fails():
    assert 1 == 2

@pytest.mark.alone
def test_dies():
    import os
    os._exit(9)
"""


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder that a whole visit leaves behind. Of its tests one fails, and one ends the process."""
    folder = tmp_path_factory.mktemp("visit")
    (folder / "test_some.py").write_text(TESTS)
    out = folder / "out"
    command = [PYTHON, "-m", "benches.gpu", "--device", "cpu", "--models", "161 x 10", "--commit", "0123abc"]
    environment = {**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--tests", str(folder / "test_some.py")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return out


def test_every_stage_of_a_visit(rehearsal):
    outcomes = {row["stage"]: row["outcome"] for row in records.read(rehearsal / records.STAGES)}
    not_passed = {name: outcome for name, outcome in outcomes.items() if outcome != "passed"}
    for tool in ("driver", "compiler"):
        if tool in not_passed:
            assert not_passed.pop(tool).startswith("left out: no ")
    assert not_passed == {
        "tests": "failed with 1",
        "tests that need the GPU for themselves": "failed with 9",
    }
    for name in ("every kernel", "core: copy", "core: sam-kernels", "launches", "memcheck", "sweeps", "training"):
        assert outcomes[name] == "passed"


def test_what_a_visit_leaves_behind(rehearsal):
    assert len(list(rehearsal.iterdir())) <= 6
    rows = records.read(rehearsal / records.RESULTS)
    assert {row["table"] for row in rows} == {"machine", "copy", "core", "launches", "training", "sweeps"}
    forms = {row["form"] for row in rows if row["table"] == "core"}
    assert {"sam-kernels", "sam-kernels, Triton, one launch", "foreach masters", "per-tensor SAM"} <= forms
    assert all(row["ms"] > 0.0 for row in rows if row["table"] == "core" and "error" not in row)
    tests = {row["test"].split("::")[1]: row["outcome"] for row in records.read(rehearsal / records.TESTS)}
    assert tests == {"test_passes": "passed", "test_fails": "failed"}


def test_a_report_of_it(rehearsal, tmp_path):
    from benches.gpu import report

    text = report.section(rehearsal, tmp_path)
    assert "commit 0123abc" in text and "| 161 x 10 | AdamW | bfloat16, masters | foreach masters |" in text
    assert "| tests | failed with 1 |" in text and "Tests: 1 failed, 1 passed." in text
    assert "| 2 launches a step | 0 (161 x 10, SGD momentum, float32) | yes |" in text


def outcomes_of(folder):
    return {row["stage"]: row["outcome"] for row in records.read(folder / records.STAGES)}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of a program's source."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def make(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return make


# Takes a child along that would write into the file when its parent has been killed.
HANGS = """
import os, signal, sys

def main(words):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.read(reading, 1)
        open(words[0], "w").write("the child goes on")
        os._exit(0)
    os.close(reading)
    signal.pause()

if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.mark.parametrize("as_command", [False, True])
def test_a_stage_that_hangs_is_killed_with_its_children(tmp_path, module, as_command):
    program = Program(module("hanging", HANGS), [str(tmp_path / "written")])
    what = Command([PYTHON, str(tmp_path / "hanging.py"), str(tmp_path / "written")]) if as_command else program
    own = Stages(tmp_path / "out", 60.0)
    assert not own.run("hangs", 1.0, what)
    assert own.run("next", 20.0, Command([PYTHON, "-c", "print('came')"]))
    assert outcomes_of(tmp_path / "out") == {"hangs": "killed at its limit", "next": "passed"}
    log = (tmp_path / "out" / records.LOG).read_text()
    assert "came" in log
    assert not (tmp_path / "written").exists()


def test_a_stage_that_fails(tmp_path, module):
    own = Stages(tmp_path, 60.0)
    raises = Program(module("raising", "def main(words):\n    raise KeyError(words[0])\n"), ["what it was"])
    assert not own.run("raises", 20.0, raises)
    assert not own.run("fails", 20.0, Command([PYTHON, "-c", "raise SystemExit(3)"]))
    assert not own.run("is not there", 20.0, Command(["no-such-tool"]))
    assert outcomes_of(tmp_path) == {
        "raises": "failed with 1",
        "fails": "failed with 3",
        "is not there": "left out: no no-such-tool here",
    }
    assert "KeyError: 'what it was'" in (tmp_path / records.LOG).read_text()


def test_stages_share_their_time(tmp_path):
    own = Stages(tmp_path, 5.0, least_seconds=10.0)
    assert not own.run("late", 20.0, Command([PYTHON, "-c", ""]))
    assert outcomes_of(tmp_path) == {"late": "left out: no time"}


def test_a_fork_that_could_not_use_the_gpu_is_not_one(tmp_path, module, monkeypatch):
    """If importing torch has looked for GPUs, programs start afresh."""
    source = "import os, sys\ndef main(words):\n    sys.exit(4)\nif __name__ == '__main__':\n    sys.exit(5)\n"
    program = Program(module("program", source))
    own = Stages(tmp_path / "out", 60.0)
    own.run("forked", 20.0, program)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    own.run("afresh", 20.0, program)
    assert outcomes_of(tmp_path / "out") == {"forked": "failed with 4", "afresh": "failed with 5"}
    assert stages.LEAST_SECONDS > 0
