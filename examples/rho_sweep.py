"""Which rho? Test accuracy on digits with wrong labels over rho, for SAM and ASAM, two base optimizers, two schedules.

``OMP_NUM_THREADS=1 python examples/rho_sweep.py`` (a quarter of an hour) saves a picture. Nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from experiments import Data, load_digits, make_model
from sam_optim import SAM, RhoFollowsLR

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD, momentum 0.9, lr 0.05": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW, lr 0.001": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01}),
}
# Whether adaptive, whether rho follows the learning rate (a cosine to zero), and the radii.
KINDS: dict[str, tuple[bool, bool, list[float]]] = {
    "SAM": (False, False, [0.0125 * 2**i for i in range(8)]),
    "SAM, rho follows lr": (False, True, [0.0125 * 2**i for i in range(8)]),
    "ASAM, elementwise": (True, False, [0.1 * 2**i for i in range(8)]),
}
BATCH = 64


def accuracy(base: str, kind: str, rho: float, sets: tuple[Data, Data], epochs: int, seed: int) -> float:
    """On the test set after the last epoch, in percent."""
    torch.manual_seed(seed)
    model = make_model()
    cls, settings = BASES[base]
    adaptive, follows, _ = KINDS[kind]
    optimizer = SAM(model.parameters(), cls, rho, adaptive, **settings)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    rho_scheduler = RhoFollowsLR(optimizer) if follows and rho > 0.0 else None
    (images, labels), (test_images, test_labels) = sets
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH):
            for _ in optimizer.each_pass():
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        scheduler.step()
        if rho_scheduler is not None:
            rho_scheduler.step()
    with torch.no_grad():
        return 100.0 * (model(test_images).argmax(1) == test_labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.2, 0.6])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("rho_sweep.png"), help="where to save the picture")
    options = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (4.6 * len(BASES), 2.7 * len(options.noise))
    figure, grid = pyplot.subplots(
        len(options.noise), len(BASES), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for row, noise in zip(grid, options.noise, strict=True):
        data = [load_digits(noise, seed) for seed in range(options.seeds)]
        for axes, base in zip(row, BASES, strict=True):

            def over_seeds(kind: str, rho: float, base: str = base, data: Any = data) -> list[float]:
                return [accuracy(base, kind, rho, sets, options.epochs, seed) for seed, sets in enumerate(data)]

            axes.axhline(statistics.mean(over_seeds("SAM", 0.0)), color="gray", linestyle="--", label="rho 0")
            for kind, (_, _, radii) in KINDS.items():
                progress = track(radii, description=f"{100 * noise:.0f} % {base.split(',')[0]}, {kind}")
                scores = [over_seeds(kind, rho) for rho in progress]
                means = [statistics.mean(own) for own in scores]
                spreads = [statistics.stdev(own) if len(own) > 1 else 0.0 for own in scores]
                axes.errorbar(radii, means, yerr=spreads, label=kind, marker="o", markersize=3, linewidth=1.2)
                print(
                    f"{noise} {base} {kind}: " + ", ".join(f"{r:g} {m:.1f}" for r, m in zip(radii, means, strict=True))
                )
            axes.set(xscale="log", title=f"{base}; {100 * noise:.0f} % random labels", ylim=(0, 100))
            axes.grid(alpha=0.3)
        row[0].set_ylabel("test accuracy, %")
    for axes in grid[-1]:
        axes.set_xlabel("rho")
    grid[0][0].legend(loc="lower left", fontsize="small")
    figure.savefig(options.output, dpi=110)
    print(f"picture saved to {options.output}")


if __name__ == "__main__":
    main()
