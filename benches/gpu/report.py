"""Tables of what a visit to a GPU has left behind, whole or in part."""

from __future__ import annotations

from pathlib import Path

from ..tables import table
from .records import Row
from .targets import OURS, Evidence, targets

NOTHING = """Nothing has been measured on a GPU yet. `make gpu-evidence` will do it, in two parts of five minutes:

* every operation once,
* the time of a step of ResNet-50, ViT-B/16, GPT-2 and a model of 1.24 B parameters, by the CUDA kernels, the Triton
  kernels and their peers,
* compute-sanitizer, and the tests that need a GPU,
* whole training steps, and sweeps.

It writes its results to `benches/results/gpu` row by row. This section is made from whatever is there."""


def summary(folder: Path) -> str | None:
    """Machine and targets; None if nothing has been measured."""
    evidence = Evidence(folder)
    if not evidence.table("core"):
        return None
    return f"{_machine(evidence)}\n\n{_targets(evidence)}"


def section(folder: Path, images: Path) -> str:
    """All that has been found."""
    evidence = Evidence(folder)
    if not evidence.machines:
        return NOTHING
    parts = [
        _machine(evidence),
        _targets(evidence),
        "Ratios to peers are of steps made one after the other, everything else is the time on the device alone: the "
        "GPU sleeps while the host launches. The host's time is beside it; bytes are those allocated at the peak "
        "besides weights and gradients, to a parameter.",
        _core(evidence),
    ]
    sweeps = [[r["model"], r["dtype"], f"`{r['tuning']}`", _ms(r)] for r in evidence.table("sweeps")]
    if sweeps:
        parts += ["### Other ways to launch", table(["model", "type", "launched with", "time a step"], sweeps)]
    if evidence.table("training"):
        parts += _training(evidence, images)
    return "\n\n".join([*parts, *_checks(evidence)])


def _machine(evidence: Evidence) -> str:
    last = evidence.machines[-1]
    commits = " and ".join(dict.fromkeys(row["commit"] for row in evidence.machines))
    commands = ", ".join(dict.fromkeys(f"`{row['command']}`" for row in evidence.machines))
    copy = f" Copy on the device: {evidence.copy:,.0f} GB/s." if evidence.copy else ""
    return (
        f"{last['device']}, torch {last['torch']}, CUDA {last['cuda']}, {last['date']}, commit {commits}, "
        f"{commands}.{copy}"
    )


def _targets(evidence: Evidence) -> str:
    words = {True: "yes", False: "**no**", None: ""}
    rows = [[target.aim, target.found, words[target.met]] for target in targets(evidence)]
    return table(["target", "farthest from it", "met"], rows)


def _ms(row: Row) -> str:
    return f"{row['ms']:.3f} ms" if "ms" in row else row["error"]


def _core(evidence: Evidence) -> str:
    ours, copy = evidence.core(OURS), evidence.copy
    launched = evidence.rows.get("launches", {})
    lines = []
    for row in sorted(evidence.table("core"), key=lambda row: (row.get("parameters", 0), row.get("model", ""))):
        case = (row.get("model", ""), row.get("base", ""), row.get("dtype", ""))
        if "ms" not in row:
            lines.append([*case, row["form"], row["error"], *[""] * 5])
            continue
        launches = launched.get((row["form"], *case), {}).get("launches")
        lines.append(
            [
                *case,
                row["form"],
                _ms(row),
                f"{100 * row['gb_per_second'] / copy:.0f} %" if copy else "",
                "" if launches is None else str(launches),
                f"{row['host_us']:.0f}",
                f"{row['extra_bytes'] / row['parameters']:.1f}" if "extra_bytes" in row else "",
                f"{row['loop_ms'] / ours[case]['loop_ms']:.1f} x" if case in ours else "",
            ]
        )
    head = ["model", "base", "type", "optimizer", "time a step", "of copy", "launches", "host µs", "bytes", "to ours"]
    return table(head, lines)


def _training(evidence: Evidence, images: Path) -> list[str]:
    """Whole training steps, and from which batch on running passes side by side gains nothing."""
    rows = evidence.table("training")
    lines = []
    for row in rows:
        key = [row["network"], row["base"], str(row["batch"]), row["step"]]
        measured = [row.get("error", ""), "", ""]
        if "loop_ms" in row:
            measured = [f"{row['loop_ms']:.2f} ms", f"{row['samples_per_second']:,.0f}", f"{row['host_us']:.0f}"]
        lines.append([*key, *measured])
    parts = [
        "### Whole training steps",
        "One after the other, in bfloat16 autocast. Streams: passes that do not depend on each other run side by side; "
        "captured: as one CUDA graph.",
        table(["network", "base", "batch", "step", "time a step", "samples a second", "host µs"], lines),
    ]
    if crossover_picture(rows, images / "gpu_passes.png"):
        parts.insert(2, "![Time of SAMPa's step to that of SAM, against the batch](images/gpu_passes.png)")
    return parts


def crossover_picture(rows: list[Row], path: Path) -> bool:
    """Steps of a ResNet against the batch, as multiples of SAM's one kernel at a time. False if there are too few."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["network"] == "ResNet" and "loop_ms" in row:
            times.setdefault(row["step"], {})[row["batch"]] = row["loop_ms"]
    unit = times.get("SAM", {})
    names = [name for name in times if name != "SAM" and "SAM" in name and "per-tensor" not in name]
    if len(unit) < 2 or not names:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name in names:
        points = sorted((batch, ms / unit[batch]) for batch, ms in times[name].items() if batch in unit)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(1.0, color="grey", linewidth=1.0, label="SAM")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch")
    axes.set_ylabel("time of a step, to SAM's")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    plt.close(figure)
    return True


def _checks(evidence: Evidence) -> list[str]:
    """How tests and stages ended."""
    counts: dict[str, int] = {}
    for row in evidence.tests:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    parts = ["### Checks"]
    if counts:
        parts.append("Tests: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + ".")
    failed = [f"* `{row['test']}`" for row in evidence.tests if row["outcome"] == "failed"]
    if failed:
        parts.append("\n".join(failed))
    stages = [[r["stage"], r["outcome"], f"{r['seconds']:.0f} s" if "seconds" in r else ""] for r in evidence.stages]
    parts.append(table(["stage", "outcome", "took"], stages))
    return parts
