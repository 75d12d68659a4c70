"""The report and the comparison of results; nothing is timed here."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("benches.report")
from benches import compare, report


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


def test_gpu_section(stored, tmp_path):
    row = {"model": "gpt2", "base": "AdamW", "dtype": "float32"}
    timed = {"percent_of_copy": 91.4, "launches": 2, "host_us": 61.0, "extra_bytes": 800, "parameters": 100}
    content = {
        "machine": {
            "device": "GPU",
            "torch": "2",
            "cuda": "13",
            "date": "d",
            "commit": "c",
            "command": "make bench-gpu",
        },
        "copy_gb_per_second": 4000.0,
        "rows": [
            {**row, "contender": "sam-kernels", "ms": 2.0, **timed},
            {**row, "contender": "foreach SAM", "ms": 9.0, **timed},
            {**row, "contender": "compiled SAM", "error": "out of memory"},
        ],
        "sweeps": [{"model": "gpt2", "sweep": "Tuning()", "ms": 2.1}],
        "training": [
            {"network": "ResNet", "base": "SGD", "batch": batch, "step": step, "ms": ms, "samples_per_second": 1234.5}
            | {"launches": 99}
            for batch in (32, 64)
            for step, ms in (("SAM", 4.0), ("SAMPa, streams", 3.0), ("per-tensor SAM", 9.0))
        ]
        + [{"network": "GPT", "base": "AdamW", "batch": 8, "step": "SAM", "error": "no memory left"}],
    }
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    text = report.page(stored)
    assert "| gpt2 | AdamW | float32 | foreach SAM | 9.000 ms | 91 % | 2 | 61 | 8.0 | 4.5 x |" in text
    assert "out of memory" in text and "`Tuning()`" in text
    assert "| ResNet | SGD | 64 | SAMPa, streams | 3.00 ms | 1,234 | 99 |" in text
    assert "no memory left" in text
    assert (tmp_path / "gpu_passes.png").stat().st_size > 5000
    assert "images/gpu_passes.png" in text


def test_readme_keeps_what_is_around_the_table(stored, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_readme(stored, readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and "10.0 ms" in text
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
