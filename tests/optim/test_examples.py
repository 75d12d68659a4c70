"""The quickstart and the examples run, and give what they say."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import experiments
import quickstart
from per_tensor_sam import PerTensorSAM
from sam_optim import SAM

from .cases import batches, loss_of, make_net, step_by_hand

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_quickstart(tmp_path, capsys):
    picture = tmp_path / "curves.png"
    runs = quickstart.main(["--epochs", "8", "--seeds", "2", "--noise", "0.3", "--output", str(picture)])
    assert picture.stat().st_size > 10_000
    assert set(runs) == {"SGD, not tuned", "SGD", "per-tensor SAM", "SAM", "Agnostic-SAM"}
    passes = {"SGD, not tuned": 1, "SGD": 1, "per-tensor SAM": 2, "SAM": 2, "Agnostic-SAM": 4}
    for name, of_name in runs.items():
        assert len(of_name) == 2
        for run in of_name:
            assert run.accuracies[-1] > 80.0
            assert len(run.accuracies) == 8
            assert len(run.step_seconds) == len(run.optimizer_seconds) == 8 * 20
            assert run.gradients == passes[name] * 8 * 20
    # The same method, whoever computes it.
    for ours, theirs in zip(runs["SAM"], runs["per-tensor SAM"], strict=True):
        assert ours.accuracies[-1] == pytest.approx(theirs.accuracies[-1], abs=1.5)
    output = capsys.readouterr().out
    assert "test accuracy" in " ".join(output.split())
    assert str(picture) in output.replace("\n", "")


@pytest.mark.parametrize("noise", [0.2, 0.6, 0.8])
@pytest.mark.parametrize("split", ["hold_out", "of a user, by the same seed"])
def test_wrong_labels_fall_into_the_held_out_part_as_into_the_other(noise, split):
    """Within what chance allows: settings chosen on a part where all labels are random are chosen on noise."""
    differences = []
    for seed in (0, 1, 7, 1000):
        (images, labels), _ = experiments.load_digits(noise, seed)
        (_, right), _ = experiments.load_digits(0.0, seed)
        is_wrong = (labels != right).float()
        if split == "hold_out":
            (kept_images, kept), (held_out_images, held_out) = experiments.hold_out((images, is_wrong), seed)
            assert len(kept) + len(held_out) == len(labels)
            together = torch.cat([kept_images, held_out_images])
            assert torch.equal(together.sum(0), images.sum(0))  # each image once; their pixels are sixteenths
        else:
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            held_out, kept = is_wrong[order[: len(order) // 3]], is_wrong[order[len(order) // 3 :]]
        share = is_wrong.mean().item()
        deviation = (share * (1 - share) * (1 / len(kept) + 1 / len(held_out))) ** 0.5
        differences.append((held_out.mean() - kept.mean()).item() / deviation)
    assert max(map(abs, differences)) < 4.0
    assert abs(sum(differences)) / len(differences) ** 0.5 < 4.0


def test_the_test_images_are_in_no_training_set():
    """Whatever the seed, so that no choice of settings has seen them."""
    (first, _), (test, _) = experiments.load_digits(0.6, 0, experiments.TEST_SEED)
    for seed in (1, 1000):
        (train, _), (same_test, _) = experiments.load_digits(0.6, seed, experiments.TEST_SEED)
        assert torch.equal(test, same_test)
        assert torch.equal(train, first)


@pytest.fixture
def label_noise():
    path = EXAMPLES / "label_noise.py"
    if not path.exists():
        pytest.skip("the examples are not here")
    return runpy.run_path(str(path), run_name="example")


@pytest.mark.parametrize("top", [(3, 4, 5), (0, 0, 4), (4, 7, 1)])
def test_search_finds_the_top_wherever_it_lies(top):
    """It tries all neighbours of its choice, and as many settings for each method."""
    ladders = [[10.0 * rung for rung in range(8)]] * 3
    tried = []

    def score(values):
        tried.append(tuple(round(value / 10.0) for value in values))
        return -sum((a - b) ** 2 for a, b in zip(tried[-1], top, strict=True))

    assert experiments.search(score, ladders, [30.0, 30.0, 30.0], 40) == [10.0 * rung for rung in top]
    assert len(tried) == len(set(tried)) == 40
    assert set(experiments.neighbours(top, ladders)) <= set(tried)


def test_search_ends_where_all_was_tried():
    assert experiments.search(lambda values: values[1], [[1.0], [0.0, 2.0, 4.0]], [1.0, 0.0], 40) == [1.0, 4.0]


def test_label_noise_goes_on_where_it_stopped(label_noise, tmp_path, monkeypatch):
    """A run that is in the file is not made again, and held-out runs never see the test set."""
    settings = quickstart.Settings(0.1, 0.0, 2)
    made = []

    def train(make, train_set, evaluated_on, epochs, seed):
        made.append((train_set, evaluated_on))
        return quickstart.train(make, train_set, evaluated_on, epochs, seed)

    monkeypatch.setitem(label_noise["run"].__globals__, "train", train)
    found = []
    for _ in range(2):
        runs = experiments.Runs(tmp_path / "runs.jsonl")
        found.append([label_noise["run"]("SAM", settings, 0.6, on, 1000, runs) for on in ("held out", "test")])
    assert found[0] == found[1]
    assert found[0][1]["gradients"] == 2.0
    (chosen_with, held_out), (trained_with, test) = made
    assert len(chosen_with[1]) + len(held_out[1]) == len(trained_with[1]) == 1257
    assert len(test[1]) == 540


def test_the_page_shows_what_the_runs_gave(label_noise, monkeypatch, tmp_path):
    """And the quickstart's settings are those that were chosen."""
    page = EXAMPLES.parent / "docs" / "experiments.md"
    if not page.exists():
        pytest.skip("the pages are not here")

    def train(*_):
        raise AssertionError("a run of the page's tables is not in the file")

    monkeypatch.setitem(label_noise["run"].__globals__, "train", train)
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    label_noise["main"](["--page", str(copy)])
    assert copy.read_text() == page.read_text()
    runs = experiments.Runs(label_noise["RESULTS"])
    for name in ("SGD", "SAM", "Agnostic-SAM"):
        assert label_noise["choose"](name, 0.6, runs) == quickstart.CHOSEN[name]


def test_continual_digits():
    """A memory of fifty forgets less than a memory of one."""
    path = EXAMPLES / "continual_digits.py"
    if not path.exists():
        pytest.skip("the examples are not here")
    example = runpy.run_path(str(path))
    options = SimpleNamespace(memory=50, epochs=2)
    sets = experiments.load_digits(0.0, 0)
    settings = {"rho": 0.02, "lr": 0.03}
    replayed, _ = example["train"](example["Method"]("DER++", "MGSER-SAM"), settings, *sets, options, 0)
    options.memory = 1
    alone, _ = example["train"](example["Method"]("ER", "SGD"), {"lr": 0.03}, *sets, options, 0)
    assert replayed.shape == (5, 5)
    assert example["final_accuracy"](replayed) > example["final_accuracy"](alone) + 20.0
    assert example["forgetting"](replayed) < example["forgetting"](alone)


def test_rho_sweep(monkeypatch, tmp_path, capsys):
    path = EXAMPLES / "rho_sweep.py"
    if not path.exists():
        pytest.skip("the examples are not here")
    picture = tmp_path / "sweep.png"
    options = ["--epochs", "3", "--seeds", "2", "--noise", "0.2", "--output", str(picture)]
    monkeypatch.setattr(sys, "argv", ["rho_sweep.py", *options])
    example = runpy.run_path(str(path))
    for name, (adaptive, follows, radii) in example["KINDS"].items():
        example["KINDS"][name] = (adaptive, follows, radii[::6])
    example["main"]()
    assert picture.stat().st_size > 10_000
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("0.2 ")]
    assert len(lines) == 6
    # The smallest radius learns, one far too large does not.
    sgd = next(line for line in lines if "SGD" in line and "SAM:" in line and "ASAM" not in line)
    small, large = (float(entry.split()[-1]) for entry in sgd.split(": ")[1].split(", "))
    assert small > 60.0 > large + 20.0


def test_edge_of_stability(monkeypatch, tmp_path, capsys):
    """SAM's Hessian ends far below that of gradient descent, both near their edges."""
    path = EXAMPLES / "edge_of_stability.py"
    if not path.exists():
        pytest.skip("the examples are not here")
    picture = tmp_path / "edge.png"
    arguments = ["--steps", "300", "--every", "50", "--output", str(picture)]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    example = runpy.run_path(str(path), run_name="example")
    runs = {}
    monkeypatch.setitem(example["main"].__globals__, "print_table", runs.update)
    example["main"]()
    assert picture.stat().st_size > 10_000
    descent, _, sam = (run[-1] for run in runs.values())
    assert 0.8 < descent.relative_sharpness < 1.4
    assert 0.8 < sam.relative_sharpness < 1.4
    assert sam.hessian_norm < 0.6 * descent.hessian_norm


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples are not part of an installation")
def test_bfloat16_weights(capsys):
    """Masters keep what roundings lose, and train as float32 does."""
    example = runpy.run_path(str(EXAMPLES / "bfloat16_weights.py"), run_name="example")
    assert example["arriving_share"](10**6, 0.05, True) == pytest.approx(1.0, abs=0.02)
    assert example["arriving_share"](10**6, 0.05, False) < 0.95
    results = example["main"](["--epochs", "8", "--seeds", "1", "--largest", "100000"])
    for found in results.values():
        assert found["bfloat16, masters"][0] == pytest.approx(found["float32"][0], abs=6.0)
    assert "100,000" in capsys.readouterr().out


def test_quickstart_noise_replaces_the_share_asked_for():
    (_, clean), (_, test) = experiments.load_digits(0.0, seed=1)
    (_, noisy), (_, same_test) = experiments.load_digits(0.6, seed=1)
    # A tenth of random labels hits the right one.
    assert (clean != noisy).float().mean().item() == pytest.approx(0.6 * 0.9, abs=0.03)
    assert torch.equal(test, same_test)


@pytest.mark.parametrize("arguments", [["--noise", "1.5"], ["--epochs", "0"], ["--rho", "large"]])
def test_quickstart_refuses_nonsense(arguments, capsys):
    with pytest.raises(SystemExit):
        quickstart.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_quickstart_help():
    run = subprocess.run([sys.executable, str(EXAMPLES / "quickstart.py"), "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "--rho" in run.stdout


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_yardstick_computes_sam(adaptive):
    results = []
    for cls in (SAM, PerTensorSAM):
        model = make_net()
        optimizer = cls(model.parameters(), torch.optim.SGD, rho=0.3, adaptive=adaptive, lr=0.1, momentum=0.9)
        for batch in batches(4):
            step_by_hand(optimizer, model, batch)
        loss_of(model, batch).backward()
        optimizer.step(lambda batch=batch, model=model: loss_of(model, batch).backward())
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples are not part of an installation")
def test_own_method():
    module = runpy.run_path(str(EXAMPLES / "own_method.py"))
    weight = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    for adaptive_base in ({"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}):
        with torch.no_grad():
            weight.copy_(torch.tensor([3.0, 1.0]))
        optimizer = module["MongeSAM"]([weight], torch.optim.SGD, rho=0.5, **adaptive_base)
        for step in (optimizer.first_step, optimizer.second_step):
            (0.5 * torch.tensor([1.0, 4.0]) * weight**2).sum().backward()
            step(zero_grad=True)
        assert weight.tolist() == pytest.approx(
            [3 - 0.1 * (3 + 0.3 / 26**0.5), 1 - 0.4 * (1 + 0.4 / 26**0.5)], abs=1e-12
        )


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples are not part of an installation")
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_triton_rule(request, backend, base):
    """By the formulas of the paper, step by step; within the kernels and between them."""
    pytest.importorskip("triton")
    if backend == "triton":
        request.getfixturevalue("interpreter")
    sagm = runpy.run_path(str(EXAMPLES / "triton_rule.py"))["SAGM"]
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    ours = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = sagm([ours], base, rho=0.5, alpha=0.01, lr=0.1, backend=backend)
    wanted = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    plain = base([wanted], lr=0.1)
    for number in range(3):
        for step in (optimizer.first_step, optimizer.second_step):
            (0.5 * curvature * ours**2).sum().backward()
            step(zero_grad=True)
        g = curvature * wanted.detach()
        g_plus = curvature * (wanted.detach() + (0.5 / g.norm() - 0.01) * g)
        wanted.grad = (g + g_plus) / 2
        plain.step()
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=0.0)
        if base is torch.optim.SGD and number == 0:
            assert ours.tolist() == pytest.approx([2.6865, 0.528], abs=1e-12)
