"""The program that measures a GPU, tried out on the CPU: what goes wrong with one row costs no other."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("benches.gpu")
from benches import contenders, gpu, gpu_training
from per_tensor_sam import PerTensorSAM

SHAPES = [(3, 5), (7,)]


class StaysPerturbed(PerTensorSAM):
    def second_step(self):
        self.base_optimizer.step()


class Raises(PerTensorSAM):
    def first_step(self):
        raise KeyError


def test_a_contender_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu, "GPU_MODELS", {"tiny": SHAPES})
    monkeypatch.setitem(contenders.CONTENDERS, "per-tensor SAM", StaysPerturbed)
    monkeypatch.setitem(contenders.CONTENDERS, "foreach SAM", Raises)
    rows = list(gpu.rows_of_model("tiny", gpu.Timer(torch.device("cpu"), 1e-4), 1e9))
    errors = {row["contender"]: row["error"] for row in rows if "error" in row}
    assert errors == {
        "per-tensor SAM": "not the reference's step: Tensor-likes are not close!",
        "foreach SAM": "not the reference's step: KeyError",
    }
    timed = [row for row in rows if "ms" in row]
    assert {row["dtype"] for row in timed} == {"float32", "bfloat16", "bfloat16, masters"}
    assert {row["base"] for row in timed} == set(contenders.BASES)
    assert all(row["percent_of_copy"] > 0.0 for row in timed)


def test_every_form_is_checked_as_it_is_launched(monkeypatch):
    """And the backend is left as it was."""

    class Backend:
        name = "cpu"
        tuning = "its own"

        def unavailable_reason(self):
            return None

    backend, seen = Backend(), []
    monkeypatch.setattr(gpu, "FORMS", [("one", backend, "in one"), ("two", backend, "in two")])
    monkeypatch.setattr(gpu, "choice_of", lambda own: seen.append(None if own is None else own.tuning) or {})
    assert gpu.wrong(SHAPES, "AdamW", torch.device("cpu"), masters=False) == {}
    assert [tuning for tuning in seen if tuning] == ["in one", "in two"]
    assert backend.tuning == "its own"


def test_training_rows_that_fail(monkeypatch):
    def step_of(name, *_):
        if name == "SAMPa":
            raise AttributeError
        return lambda: None

    monkeypatch.setattr(gpu_training, "step_of", step_of)
    monkeypatch.setattr(gpu_training, "CASES", [("MLP", "SGD momentum", 4)])
    rows = {row["step"]: row for row in gpu_training.rows(lambda call: {"ms": 1.0}, torch.device("cpu"))}
    assert rows["SAMPa"]["error"] == "AttributeError"
    assert all("ms" in row for name, row in rows.items() if name != "SAMPa")


def test_it_needs_a_gpu(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as exit:
        gpu.main()
    assert exit.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
