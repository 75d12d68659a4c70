"""The measurement of host time makes steps and tells what they take."""

from __future__ import annotations

import sys

from benches import host_time


def test_it_measures_hot_steps_and_steps_between_passes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["host_time", "--steps", "20"])
    monkeypatch.setattr(host_time, "TENSORS", (1, 3))
    host_time.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 2 * len(host_time.BASES)
    assert all("hot" in line and "between passes" in line for line in lines)


def test_its_steps_move_the_weights():
    for base in host_time.BASES:
        optimizer = host_time.optimizer_of(base, 2)
        before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        seconds = host_time.make_step(optimizer, [p.detach() + 1.0 for p in before], lambda: None)
        assert seconds > 0.0 and optimizer.last_step.updated
        assert all((p != b).any() for p, b in zip(optimizer.param_groups[0]["params"], before, strict=True))
