"""Writes docs/performance.md, its pictures and the README's table from the stored results.

    python -m benches.report

No number in those places is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from .gpu import report as gpu_report
from .tables import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benches/results"
PAGE = ROOT / "docs/performance.md"
IMAGES = ROOT / "docs/images"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

PEERS = ("per-tensor SAM", "pytorch-optimizer", "foreach SAM")
NAMES = {"resnet50": "ResNet-50 (161 tensors, 25.6 M)", "161 x 10": "161 tensors of 10"}
TITLES = {
    "per-tensor SAM": "SAM as commonly written",
    "pytorch-optimizer": "pytorch-optimizer",
    "foreach SAM": "foreach SAM, written with care",
}


class Results:
    """The CPU results: benchmarks by what they measure."""

    def __init__(self, path: Path) -> None:
        self.content = json.loads(path.read_text())
        self.steps: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        self.scaling: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
        self.training: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        self.variants: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        self.in_bfloat16: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for entry in self.content["benchmarks"]:
            extra = entry["extra_info"]
            contender = extra.get("contender") or entry["params"]["contender"]
            if "scaling" in extra:
                self.scaling[extra["scaling"]][contender].append((extra["x"], entry["stats"]["median"]))
            elif "training" in extra:
                self.training[entry["group"]][contender] = entry
            elif "in_bfloat16" in extra:
                self.in_bfloat16[extra["in_bfloat16"]][contender] = entry
            elif "variant" in extra:
                self.variants[extra["variant"]][contender] = entry
            else:
                self.steps[entry["group"]][contender] = entry

    @property
    def machine(self) -> str:
        info = self.content["machine_info"]
        cpu = info["cpu"]
        return (
            f"{cpu['count']} cores of an {cpu['brand_raw']} (virtual machine), Python {info['python']}, "
            f"torch {info['torch']}, {self.content['datetime'][:10]}, commit {self.content['commit_info']['id'][:7]}, "
            f"`{self.content['command']}`"
        )


def seconds(value: float) -> str:
    return f"{1e3 * value:.1f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} µs"


def step_table(results: Results) -> str:
    """Time of first_step() + second_step(); peers with their ratio to ours."""
    rows = []
    for group, entries in results.steps.items():
        ours = entries["sam-kernels"]["stats"]["median"]
        cells = [
            f"{seconds(entries[p]['stats']['median'])} ({entries[p]['stats']['median'] / ours:.1f} x)" for p in PEERS
        ]
        extra = entries["sam-kernels"]["extra_info"]
        share = 100 * extra["floor_bytes"] / ours / 1e9 / extra["copy_gb_per_second"]
        rows.append(
            [
                NAMES.get(group.split(",")[0], "") + group[group.index(",") :],
                f"**{seconds(ours)}**",
                f"{share:.0f} %" if extra["floor_bytes"] > 1e8 else "",
                *cells,
            ]
        )
    head = ["shapes, method, base", "sam-kernels", "of copy", *(TITLES[p] for p in PEERS)]
    return table(head, rows)


def memory_table(results: Results) -> str:
    """Peak memory besides parameters and gradients, in bytes a parameter."""
    rows = []
    for group, entries in results.steps.items():
        extras = {name: entry["extra_info"] for name, entry in entries.items()}
        count = extras["sam-kernels"].get("parameters", 0)
        if count > 1e6:
            own = [f"{extras[name]['peak_bytes'] / count:.1f}" for name in ("sam-kernels", *PEERS)]
            rows.append([NAMES.get(group.split(",")[0], "") + group[group.index(",") :], *own])
    return table(["shapes, method, base", "sam-kernels", *(TITLES[p] for p in PEERS)], rows) if rows else ""


def in_bfloat16_table(results: Results) -> str:
    rows = []
    for base, entries in results.in_bfloat16.items():
        ours = entries["sam-kernels"]["stats"]["median"]
        extra = entries["sam-kernels"]["extra_info"]
        share = 100 * extra["floor_bytes"] / ours / 1e9 / extra["copy_gb_per_second"]
        for name, entry in entries.items():
            median = entry["stats"]["median"]
            rows.append(
                [
                    base,
                    name,
                    f"{seconds(median)} ({median / ours:.1f} x)",
                    f"{share:.0f} %" if name == "sam-kernels" else "",
                    f"{entry['extra_info']['peak_bytes'] / extra['parameters']:.1f}",
                ]
            )
    return table(["base", "optimizer", "time a step", "of copy", "bytes a parameter"], rows)


def variants_table(results: Results) -> str:
    rows = []
    for method, entries in results.variants.items():
        ours, peer = (entries[name]["stats"]["median"] for name in ("sam-kernels", "pytorch-optimizer"))
        rows.append([method, f"**{seconds(ours)}**", f"{seconds(peer)} ({peer / ours:.1f} x)"])
    return table(["method", "sam-kernels", "pytorch-optimizer"], rows)


def training_table(results: Results) -> str:
    rows = []
    for group, entries in results.training.items():
        extra = next(iter(entries.values()))["extra_info"]
        medians = {name: entry["stats"]["median"] for name, entry in entries.items()}
        for name in ("base optimizer", "per-tensor SAM", *(n for n in medians if n.startswith("sam-kernels"))):
            share = entries[name]["extra_info"]["optimizer_share"]
            spread = entries[name]["stats"]["iqr"] / medians[name]
            rows.append(
                [
                    f"{group}, {extra['parameters'] / 1e6:.1f} M parameters in {extra['tensors']} tensors",
                    name,
                    f"{1e3 * medians[name]:.0f} ms ± {100 * spread / 2:.0f} %",
                    f"{extra['samples'] / medians[name]:,.0f} {extra['unit']}/s",
                    "" if share is None else f"{100 * share:.1f} %",
                ]
            )
    return table(["network", "optimizer", "time a step", "throughput", "optimizer's share"], rows)


def scaling_pictures(results: Results) -> list[Path]:
    """Log-log pictures of the step's time, one against parameters and one against tensors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {
        "parameters": "parameters, in 64 tensors (float32, SGD with momentum)",
        "tensors": "tensors of 100 elements (float32, SGD with momentum)",
    }
    written = []
    for what, series in results.scaling.items():
        figure, axes = plt.subplots(figsize=(6.4, 4.0))
        for name in ("sam-kernels", *PEERS):
            points = sorted(series.get(name, []))
            if points:
                style = {"linewidth": 2.4} if name == "sam-kernels" else {"linewidth": 1.2, "linestyle": "--"}
                x, y = zip(*points, strict=True)
                axes.loglog(x, [1e3 * value for value in y], marker="o", label=TITLES.get(name, name), **style)
        axes.set_xlabel(labels[what])
        axes.set_ylabel("first_step + second_step, ms")
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(frameon=False)
        figure.tight_layout()
        path = IMAGES / f"scaling_{what}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": ""})
        plt.close(figure)
        written.append(path)
    return written


def scaling_table(results: Results, what: str) -> str:
    series = results.scaling[what]
    xs = sorted({x for points in series.values() for x, _ in points})
    rows = []
    for name in ("sam-kernels", *PEERS):
        values = dict(series.get(name, []))
        rows.append([TITLES.get(name, name), *(seconds(values[x]) if x in values else "" for x in xs)])
    return table([what, *(f"{x:,}" for x in xs)], rows)


def page(results: Results) -> str:
    parts = [
        "# Performance",
        """This page is written by `python -m benches.report` from `benches/results`; no number in it is typed by hand.
Times are medians of one run. The contenders take turns, each in a process of its own; before that, all of them are
checked to make the same step. "Of copy" compares the bandwidth with that of `Tensor.copy_` in the same run.""",
        f"CPU: {results.machine}.",
        "## The optimizer side of a step",
        "Time of `first_step() + second_step()`, float32. In brackets: how many times slower than sam-kernels it is.",
        step_table(results),
    ]
    memory = memory_table(results)
    if memory:
        parts += [
            "### Memory",
            "The peak of what a step has allocated besides parameters and gradients, with the base optimizer's state, "
            "in bytes a parameter. A float32 parameter itself has 4.",
            memory,
        ]
    if results.in_bfloat16:
        parts += [
            "### Models in bfloat16",
            "ResNet-50's shapes with weights and gradients in bfloat16, in three ways: with `master_weights=True`; the "
            "same written with care in torch's foreach operations; and without masters, which loses small "
            "perturbations and updates. A step with masters moves 30 bytes a parameter with SGD and 38 with AdamW. "
            "The last column is the peak memory besides weights and gradients.",
            in_bfloat16_table(results),
        ]
    if results.variants:
        parts += [
            "### SAM's family",
            "The optimizer side of a step, ResNet-50's shapes, SGD with momentum. LookSAM's time is that of a step "
            "with two passes. Four of five steps take only one pass with ours, but two with the peer's.",
            variants_table(results),
        ]
    if results.scaling:
        parts += [
            "## Scaling",
            "![Time against parameters](images/scaling_parameters.png)",
            "![Time against tensors](images/scaling_tensors.png)",
            scaling_table(results, "parameters"),
            scaling_table(results, "tensors"),
        ]
    if results.training:
        parts += [
            "## Whole training steps",
            """Small networks on random data. The time includes forward and backward passes; the spread is half the
interquartile range. The optimizer's share is that of its calls, timed by themselves. On a CPU the passes take
nearly all of the time: SAM needs two, and only the optimizer's calls can be made cheaper. Agnostic-SAM makes four
passes, two of them on a quarter of the batch.""",
            training_table(results),
        ]
    parts += ["## GPU", gpu_report.section(RESULTS / "gpu", IMAGES)]
    return "\n\n".join(parts) + "\n"


def update_readme(results: Results, path: Path) -> None:
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"{path.name} lacks {BEGIN} ... {END}")
    parts = [BEGIN, f"On {results.machine}:", step_table(results)]
    on_gpu = gpu_report.summary(RESULTS / "gpu")
    if on_gpu:
        parts.append(f"On a GPU: {on_gpu}")
    path.write_text(before + "\n\n".join([*parts, END]) + after)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    results = Results(RESULTS / "cpu.json")
    scaling_pictures(results)
    PAGE.write_text(page(results))
    update_readme(results, README)
    print(f"wrote {PAGE.relative_to(ROOT)} and the table of {README.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
