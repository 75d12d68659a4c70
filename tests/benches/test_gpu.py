"""The programs that measure a GPU, tried out on the CPU: what goes wrong with one row costs no other."""

from __future__ import annotations

import subprocess

import pytest
import torch

pytest.importorskip("benches.gpu")
from benches import contenders
from benches.gpu import core, forms, launches, machine, records, sweeps, timer, training
from per_tensor_sam import PerTensorSAM

CPU = torch.device("cpu")
SHAPES = [(3, 5), (7,)]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    for module in (core, launches, sweeps):
        monkeypatch.setattr(module, "GPU_MODELS", {"tiny": SHAPES, "tinier": SHAPES[:1]})


class StaysPerturbed(PerTensorSAM):
    def second_step(self):
        self.base_optimizer.step()


class Raises(PerTensorSAM):
    def first_step(self):
        raise KeyError


def measured(call):
    call()
    return {"ms": 2.0, "loop_ms": 3.0, "host_us": 4.0}


def core_rows(form, dtypes=forms.ALL_DTYPES, measure=measured):
    return list(core.rows(form, ["tiny"], list(contenders.BASES), dtypes, CPU, measure))


def test_every_form_makes_the_same_step():
    for name, form in forms.FORMS.items():
        if form.compiled:
            continue
        rows = core_rows(name)
        if form.missing(CPU):
            assert rows == [{"table": "core", "form": name, "error": form.missing(CPU)}]
            continue
        assert {(row["base"], row["dtype"]) for row in rows} == {
            (base, dtype) for base in contenders.BASES for dtype in form.dtypes
        }
        assert all(row["gb_per_second"] > 0.0 and "error" not in row for row in rows)


@pytest.mark.parametrize(
    ("contender", "error"),
    [(StaysPerturbed, "not the definition's step: Tensor-likes are not close!"), (Raises, "KeyError")],
)
def test_a_form_that_is_wrong_is_not_timed(monkeypatch, contender, error):
    monkeypatch.setitem(contenders.CONTENDERS, "per-tensor SAM", contender)
    rows = core_rows("per-tensor SAM", measure=lambda call: pytest.fail("timed"))
    assert rows and all(row["error"].endswith(error) for row in rows)


def test_a_row_that_fails_costs_no_other():
    calls = []

    def measure(call):
        calls.append(call)
        if len(calls) == 2:
            raise MemoryError("no memory left")
        return measured(call)

    rows = core_rows("sam-kernels", measure=measure)
    assert [row.get("error") for row in rows] == [None, "no memory left", *[None] * 4]


def test_a_gpu_that_is_lost_ends_the_program(monkeypatch, tmp_path):
    """After an error that it does not get over; the row that tells of it is on disk."""
    monkeypatch.setattr(core, "lost", lambda device: True)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit) as exit:
        core.main(["--form", "foreach SAM", "--records", str(path), "--models", "tiny", "--device", "cpu"])
    assert exit.value.code == core.LOST_DEVICE
    assert len(records.read(path)) == 1


def test_a_gpu_is_lost_if_it_cannot_be_waited_for(monkeypatch):
    def raise_error():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", raise_error)
    assert core.lost(torch.device("cuda"))
    assert not core.lost(CPU)


def test_a_form_launches_as_it_says():
    """And the backend is left as it was."""

    class Backend:
        name, tuning = "cpu", "its own"

        def unavailable_reason(self):
            return None

    backend = Backend()
    with pytest.raises(KeyError), forms.Form("sam-kernels", backend, "in one").launching():
        assert backend.tuning == "in one"
        raise KeyError
    assert backend.tuning == "its own"


def test_peers_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(forms.importlib.util, "find_spec", lambda name: None)
    assert core_rows("pytorch-optimizer")[0]["error"] == "pytorch-optimizer is not installed"


class Device:
    """Stands in for a GPU: launches take the host some time, kernels the device, one after the other."""

    launch, kernel = 5.0, 2.0

    def __init__(self, monkeypatch):
        self.now = self.free = 0.0
        monkeypatch.setattr(timer.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(cycles / 2e9))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def queue(self, seconds):
        self.free = max(self.now, self.free) + seconds

    def synchronize(self):
        self.now = max(self.now, self.free)

    def call(self):
        self.now += self.launch
        self.queue(self.kernel)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = max(self.device.now, self.device.free)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_the_hosts_time_does_not_count_as_the_devices(monkeypatch):
    """A launch takes longer than its kernel."""
    device = Device(monkeypatch)
    row = timer.Timer(torch.device("cuda"), 1.0)(device.call)
    assert row["ms"] == pytest.approx(1e3 * device.kernel)
    assert row["host_us"] == pytest.approx(1e6 * device.launch)
    assert row["loop_ms"] >= 1e3 * device.launch


def test_training_rows_that_fail(monkeypatch):
    def step_of(name, *_):
        if name == "SAMPa":
            raise AttributeError
        return lambda: None

    monkeypatch.setattr(training, "step_of", step_of)
    monkeypatch.setattr(training, "CASES", [("MLP", "SGD momentum", 4)])
    rows = {row["step"]: row for row in training.rows(["MLP"], list(training.DRIVERS), CPU, measured)}
    assert rows["SAMPa"]["error"] == "AttributeError"
    assert all("ms" in row for name, row in rows.items() if name != "SAMPa")


def test_sweeps_and_launches():
    rows = list(sweeps.rows(["tiny"], ["float32"], CPU, measured))
    assert len({row["tuning"] for row in rows}) == len(rows) == len(sweeps.FORMS)
    assert all(row["launches"] == 0 for row in launches.rows(["tiny"], CPU))


@pytest.mark.parametrize("problem", [FileNotFoundError, None])
def test_a_commit_that_git_does_not_know(monkeypatch, problem):
    def run(*_, **__):
        if problem:
            raise problem
        return subprocess.CompletedProcess([], 128, stdout="")

    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine.commit_of(None) == "unknown"
    assert machine.commit_of("0123abc") == "0123abc"


def test_the_machine_is_described_without_its_name(tmp_path):
    machine.main(["--records", str(tmp_path / "rows.jsonl"), "--device", "cpu", "--commit", "0123abc"])
    (row,) = records.read(tmp_path / "rows.jsonl")
    assert row["commit"] == "0123abc" and row["torch"] == torch.__version__
    assert set(row["backends"]) >= {"cuda", "triton", "cpu"}


def test_without_a_gpu_the_machine_says_so(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(machine, "describe", lambda *_: {"table": "machine"})
    with pytest.raises(SystemExit) as exit:
        machine.main(["--records", str(tmp_path / "rows.jsonl")])
    assert "is not there" in str(exit.value.code) or "is_available() is False" in str(exit.value.code)


def test_torn_lines_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": \n')
    records.append(path, {"a": 2})
    assert records.read(path) == [{"a": 1}, {"a": 2}]
    assert records.read(tmp_path / "none") == []


def test_the_careful_peer_makes_no_copy_anew(monkeypatch):
    """A clone for each tensor is a launch for each."""
    parameters = forms.make_parameters(SHAPES, "float32", CPU)
    step = forms.FORMS["foreach SAM"].step(parameters, "SGD momentum", "float32")
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: pytest.fail("cloned"))
    step()
