"""A model in bfloat16: what becomes of SAM's perturbation and of small updates, with masters and without.

First how much of a perturbation e arrives in the weights that the second pass sees, <w+ - w, e> / <e, e>, for models of
several sizes. Then the quickstart's network on digits, trained as float32, as bfloat16, and as bfloat16 with
``master_weights=True``, at the quickstart's settings and where updates are small. Run it:
``python examples/bfloat16_weights.py`` (two minutes).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from experiments import load_digits, make_model
from sam_optim import SAM

KINDS = ("float32", "bfloat16", "bfloat16, masters")
SIZES = (10**5, 10**6, 10**7, 10**8)
# Share of random training labels, rho, lr.
SETTINGS = ((0.6, 0.2, 0.05), (0.6, 0.05, 0.05), (0.2, 0.2, 0.002))


def arriving_share(count: int, rho: float, has_masters: bool) -> float:
    """<w+ - w, e> / <e, e> for normal weights of standard deviation 0.02 and a normal gradient."""
    torch.manual_seed(0)
    own = 0.02 * torch.randn(count)
    weights = nn.Parameter(own.bfloat16())
    optimizer = SAM([weights], torch.optim.SGD, rho=rho, lr=0.1, master_weights=has_masters)
    if has_masters:
        state = optimizer.state_dict()
        state["method_state"] = {"master_weights": [own]}
        optimizer.load_state_dict(state)
    else:
        own = weights.detach().float()
    weights.grad = torch.randn(count).bfloat16()
    optimizer.first_step()
    e = weights.grad.float()
    e *= rho / e.norm()
    return float(torch.dot(weights.detach().float() - own, e) / torch.dot(e, e))


def train(kind: str, setting: tuple[float, float, float], epochs: int, seed: int) -> float:
    """Test accuracy in percent."""
    noise, rho, lr = setting
    train_set, test_set = load_digits(noise, seed)
    torch.manual_seed(seed)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = make_model().to(dtype)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=lr, momentum=0.9, master_weights="masters" in kind)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.base_optimizer, epochs)
    images, labels = train_set
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(64):
            x, y = images[index].to(dtype), labels[index]
            nn.functional.cross_entropy(model(x).float(), y).backward()
            optimizer.first_step(zero_grad=True)
            nn.functional.cross_entropy(model(x).float(), y).backward()
            optimizer.second_step(zero_grad=True)
        scheduler.step()
    with torch.no_grad():
        correct = model(test_set[0].to(dtype)).argmax(1) == test_set[1]
    return 100.0 * correct.float().mean().item()


def main(arguments: list[str] | None = None) -> dict[tuple[float, float, float], dict[str, list[float]]]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--largest", type=int, default=SIZES[-1], help="parameters of the largest model of the first part"
    )
    options = parser.parse_args(arguments)
    console, start = Console(), time.perf_counter()

    table = Table(title="Of a perturbation with rho 0.05 that arrives in weights of bfloat16")
    table.add_column("parameters", justify="right")
    for kind in KINDS[1:]:
        table.add_column(kind, justify="right")
    for count in (size for size in SIZES if size <= options.largest):
        shares = [arriving_share(count, 0.05, "masters" in kind) for kind in KINDS[1:]]
        table.add_row(f"{count:,}", *(f"{100 * share:.0f} %" for share in shares))
    console.print(table)

    results: dict[tuple[float, float, float], dict[str, list[float]]] = {
        s: {kind: [] for kind in KINDS} for s in SETTINGS
    }
    for setting, seed in track([(s, n) for s in SETTINGS for n in range(options.seeds)], description="training"):
        for kind in KINDS:
            results[setting][kind].append(train(kind, setting, options.epochs, seed))
    table = Table(title=f"SAM on digits: test accuracy, {options.seeds} seeds, {options.epochs} epochs")
    for column in ("random labels", "rho", "lr", *KINDS):
        table.add_column(column, justify="right")
    for (noise, rho, lr), found in results.items():
        cells = []
        for accuracies in found.values():
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            cells.append(f"{statistics.mean(accuracies):.1f} ± {spread:.1f} %")
        table.add_row(f"{100 * noise:.0f} %", f"{rho}", f"{lr}", *cells)
    console.print(table)
    console.print(f"{time.perf_counter() - start:.0f} s, torch {torch.__version__}")
    return results


if __name__ == "__main__":
    main()
