"""The report and the comparison of results; nothing is timed here."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("benches.report")
from benches import compare, report
from benches.gpu import records


def entry(group, contender, median, **extra):
    return {
        "group": group,
        "params": {"contender": contender},
        "extra_info": {"contender": contender, **extra},
        "stats": {"median": median, "iqr": 0.01 * median, "rounds": 25},
    }


def results(ours, peer):
    step = {"floor_bytes": 4e8, "copy_gb_per_second": 50.0, "peak_bytes": 8e7, "parameters": 1e7}
    contenders = ("per-tensor SAM", "pytorch-optimizer", "foreach SAM")
    training = {"training": "GPT", "parameters": 2e6, "tensors": 52, "samples": 512, "unit": "tokens"}
    return {
        "machine_info": {"cpu": {"count": 2, "brand_raw": "CPU"}, "python": "3.12", "torch": "2.13"},
        "commit_info": {"id": "0123456789"},
        "datetime": "2026-01-02T03:04:05",
        "command": "make bench",
        "benchmarks": [
            entry("resnet50, SAM, SGD momentum", "sam-kernels", ours, **step),
            *(entry("resnet50, SAM, SGD momentum", name, peer, **step) for name in contenders),
            *(
                entry(f"{x}", name, 1e-6 * x * (i + 1), scaling=what, x=x)
                for what in ("parameters", "tensors")
                for x in (10, 100)
                for i, name in enumerate(("sam-kernels", *contenders))
            ),
            entry("resnet50, GSAM, SGD momentum", "sam-kernels", 0.02, variant="GSAM"),
            entry("resnet50, GSAM, SGD momentum", "pytorch-optimizer", 0.05, variant="GSAM"),
            *(
                entry("GPT, AdamW", name, 0.1, optimizer_share=0.125, **training)
                for name in ("base optimizer", "per-tensor SAM", "sam-kernels")
            ),
        ],
    }


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    (tmp_path / "cpu.json").write_text(json.dumps(results(0.010, 0.025)))
    return report.Results(tmp_path / "cpu.json")


def test_page(stored, tmp_path):
    text = report.page(stored)
    assert "| ResNet-50 (161 tensors, 25.6 M), SAM, SGD momentum | **10.0 ms** | 80 % | 25.0 ms (2.5 x) |" in text
    assert "5,120 tokens/s | 12.5 % |" in text
    assert "Nothing has been measured on a GPU yet." in text
    assert "| 8.0 | 8.0 | 8.0 | 8.0 |" in text
    assert "| GSAM | **20.0 ms** | 50.0 ms (2.5 x) |" in text
    assert [path.name for path in report.scaling_pictures(stored)] == ["scaling_parameters.png", "scaling_tensors.png"]
    assert all((tmp_path / f"scaling_{what}.png").stat().st_size > 5000 for what in ("parameters", "tensors"))


def gpu_rows(device="GPU", ms=2.0):
    """Of one visit that did not come far."""
    case = {"model": "gpt2", "base": "AdamW", "dtype": "float32", "parameters": 124_000_000}
    times = {"gb_per_second": 48e-9 * 124e6 / (ms / 1e3), "host_us": 61.0, "extra_bytes": 8 * 124_000_000}
    training = {"table": "training", "network": "ResNet", "base": "SGD", "host_us": 99.0, "samples_per_second": 1234.5}
    machine = {"device": device, "torch": "2", "cuda": "13", "date": "d", "command": "python -m benches.gpu"}
    return [
        {"table": "machine", **machine, "commit": "c1"},
        {"table": "machine", **machine, "commit": "c2"},
        {"table": "copy", "gb_per_second": 3000.0},
        {"table": "core", "form": "sam-kernels", **case, **times, "ms": ms, "loop_ms": ms},
        {"table": "core", "form": "foreach SAM", **case, **times, "ms": 9.0, "loop_ms": 10.0},
        {"table": "core", "form": "compiled SAM", **case, "error": "out of memory"},
        {"table": "launches", "form": "sam-kernels", **case, "launches": 2},
        {"table": "sweeps", "model": "gpt2", "base": "SGD", "dtype": "float32", "tuning": "Tuning()", "ms": 2.1},
        *(
            {**training, "batch": batch, "step": step, "loop_ms": ms}
            for batch in (32, 64)
            for step, ms in (("SAM", 4.0), ("SAMPa, streams", 3.0), ("per-tensor SAM", 9.0))
        ),
        {"table": "training", "network": "GPT", "base": "AdamW", "batch": 8, "step": "SAM", "error": "no memory left"},
    ]


def write(folder, rows, tests=()):
    folder.mkdir(exist_ok=True)
    for name, own in ((records.RESULTS, rows), (records.TESTS, tests)):
        for row in own:
            records.append(folder / name, row)


def test_gpu_section(stored, tmp_path):
    tests = [{"test": "a", "outcome": "passed"}, {"test": "b", "outcome": "failed"}, {"test": "b", "outcome": "passed"}]
    write(tmp_path / "gpu", gpu_rows(), tests)
    text = report.page(stored)
    assert "commit c1 and c2" in text
    assert "| gpt2 | AdamW | float32 | sam-kernels | 2.000 ms | 99 % | 2 | 61 | 8.0 | 1.0 x |" in text
    assert "| gpt2 | AdamW | float32 | foreach SAM | 9.000 ms | 99 % |  | 61 | 8.0 | 5.0 x |" in text
    assert "out of memory" in text and "`Tuning()`" in text
    assert "| ResNet | SGD | 64 | SAMPa, streams | 3.00 ms | 1,234 | 99 |" in text
    assert "no memory left" in text and "Tests: 2 passed." in text
    assert (tmp_path / "gpu_passes.png").stat().st_size > 5000
    assert "images/gpu_passes.png" in text


@pytest.mark.parametrize(("ms", "share", "met"), [(2.0, 99, "yes"), (2.5, 79, "**no**")])
def test_gpu_targets(stored, tmp_path, ms, share, met):
    write(tmp_path / "gpu", gpu_rows(ms=ms))
    text = report.page(stored)
    farthest = f"{share} % (gpt2, AdamW, float32) | {met}"
    assert f"| at least 90 % of a copy's bandwidth from 100 M parameters on | {farthest} |" in text
    assert "| 2 launches a step | 2 (gpt2, AdamW, float32) | yes |" in text
    assert "| at least 4 times as fast as foreach SAM for ResNet-50 | not measured |  |" in text


def test_gpu_rows_of_another_machine_are_left_out(stored, tmp_path):
    """And of one machine the last row for a case counts."""
    write(tmp_path / "gpu", [*gpu_rows("old GPU", 1.0)[:-2], *gpu_rows("GPU", 4.0), gpu_rows(ms=2.0)[3]])
    text = report.page(stored)
    assert "GPU, torch 2" in text and "old GPU" not in text
    assert "sam-kernels | 2.000 ms" in text and "1.000 ms" not in text and "4.000 ms" not in text


def test_gpu_results_that_are_not_there_yet(stored, tmp_path):
    write(tmp_path / "gpu", gpu_rows()[:1])
    text = report.page(stored)
    assert "commit c1" in text and text.count("not measured") == 6


def test_readme_keeps_what_is_around_the_table(stored, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_readme(stored, readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and "10.0 ms" in text and "GPU" not in text
    write(tmp_path / "gpu", gpu_rows())
    report.update_readme(stored, readme)
    assert "On a GPU: GPU, torch 2" in readme.read_text() and "| 2 launches a step |" in readme.read_text()
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks"):
        report.update_readme(stored, readme)


@pytest.mark.parametrize(
    ("ours", "peer", "verdict"),
    [(0.010, 0.025, "same"), (0.0101, 0.025, "same"), (0.012, 0.025, "SLOWER"), (0.008, 0.025, "faster")],
)
def test_compare(tmp_path, monkeypatch, capsys, ours, peer, verdict):
    """On a machine that is slower by a half altogether."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(results(0.010, 0.025)))
    new.write_text(json.dumps(results(1.5 * ours, 1.5 * peer)))
    monkeypatch.setattr(sys, "argv", ["compare", str(old), str(new)])
    if verdict == "SLOWER":
        with pytest.raises(SystemExit) as exit:
            compare.main()
        assert exit.value.code == 1
    else:
        compare.main()
    line = next(line for line in capsys.readouterr().out.splitlines() if "resnet50" in line)
    assert line.startswith(verdict)


def test_peak_memory():
    """What an optimizer holds and what its steps take for a while, not what was there before."""
    import torch

    from benches.memory import peak_bytes

    before = [torch.ones(10**6)]

    def make_step():
        held = torch.ones(2 * 10**6)

        def step():
            before.clear()
            return (held * 2.0)[:1].item()

        return step

    assert peak_bytes(make_step) == pytest.approx(16e6, rel=0.01)


def test_peak_memory_after_an_earlier_profile():
    """The profiler keeps the sizes of what it saw allocated and not freed; the addresses are used again."""
    import torch

    from benches.memory import peak_bytes

    kept = []
    peak_bytes(lambda: lambda: kept.extend(torch.ones(10**5) for _ in range(20)))
    addresses = {t.data_ptr() for t in kept}
    kept.clear()
    again = [torch.ones(10**5) for _ in range(100)]
    if not addresses & {t.data_ptr() for t in again}:
        pytest.skip("the allocator gave other addresses")

    def make_step():
        again.clear()
        held = torch.ones(2 * 10**6)
        return lambda: held.sum().item()

    assert peak_bytes(make_step) == pytest.approx(8e6, rel=0.01)
