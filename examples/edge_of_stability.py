"""Gradient descent and SAM at their edges of stability (arXiv 2309.12488), on digits, with full batches.

Gradient descent sharpens the loss until the Hessian's norm reaches 2 / lr, and then hovers there. SAM's edge is lower,
and falls with the gradient: it stops earlier, in flatter places. Run it: ``python examples/edge_of_stability.py``; it
prints a table and saves a picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from experiments import Data, load_digits
from sam_optim import SAM, Stability, StabilityMonitor


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def squared_error(model: nn.Module, batch: Data) -> torch.Tensor:
    return (model(batch[0]) - nn.functional.one_hot(batch[1], 10)).pow(2).sum(1).mean() / 2


def train(rho: float, batch: Data, options: argparse.Namespace) -> list[Stability]:
    """Full-batch training, measured every so many steps."""
    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=options.lr)
    monitor = StabilityMonitor(model, optimizer, squared_error)
    found = []
    for step in track(range(options.steps + 1), description=f"rho {rho}"):
        if step % options.every == 0:
            found.append(monitor.measure(batch))
        for _ in optimizer.each_pass():
            squared_error(model, batch).backward()
    return found


def print_table(runs: dict[float, list[Stability]]) -> None:
    table = Table(title="At the end of training")
    for column in ("rho", "loss", "|g|", "Hessian norm", "edge", "2 / lr", "|cos(g, v)|", "|cos(g+, v)|"):
        table.add_column(column, justify="right")
    for rho, run in runs.items():
        # Single measurements hop about at the edge: the median of the last tenth.
        last = [torch.tensor(row[:7]) for row in run[-max(1, len(run) // 10) :]]
        loss, norm, eigenvalue, edge, descent_edge, alignment, perturbed = torch.stack(last).median(0).values.tolist()
        row = (loss, norm, abs(eigenvalue), edge, descent_edge, alignment, perturbed)
        table.add_row(f"{rho}", *(f"{value:.3g}" for value in row))
    Console().print(table)


def save_picture(runs: dict[float, list[Stability]], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 2), layout="constrained")
    colours = ["tab:gray", "tab:blue", "tab:green"]
    for (rho, run), colour in zip(runs.items(), colours, strict=True):
        steps = [options.every * number for number in range(len(run))]
        name = "gradient descent" if rho == 0.0 else f"SAM, rho {rho}"
        left.plot(steps, [found.hessian_norm for found in run], color=colour, label=name)
        left.plot(steps, [found.edge for found in run], color=colour, linestyle="--", linewidth=1)
        right.plot(steps, [found.loss for found in run], color=colour, label=name)
    left.set(xlabel="step", ylabel="Hessian norm; dashed: the edge", yscale="log", title=f"lr {options.lr}")
    right.set(xlabel="step", ylabel="training loss", yscale="log")
    right.legend(loc="upper right", fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        for kind in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            kind(ticker.FormatStrFormatter("%g"))
    figure.savefig(options.output, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--rhos", type=float, nargs=3, default=[0.0, 0.03, 0.1], help="of three runs; 0 for none")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=25, help="steps between measurements")
    parser.add_argument("--output", type=Path, default=Path("edge_of_stability.png"), help="where to save the picture")
    options = parser.parse_args()
    batch, _ = load_digits(0.0, 0)
    runs = {rho: train(rho, batch, options) for rho in options.rhos}
    print_table(runs)
    save_picture(runs, options)
    print(f"picture saved to {options.output}")


if __name__ == "__main__":
    main()
