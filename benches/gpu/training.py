"""Whole training steps on a GPU: what the passes cost, side by side, captured, and one kernel at a time.

python -m benches.gpu.training --records FILE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.per_tensor_sam import PerTensorSAM
from sam_optim import SAM, AgnosticSAM, SAMPa, TrainStep

from ..contenders import BASES, RHO
from ..networks import loss_of, make
from . import records
from .core import LOST_DEVICE, Measure, first_line, lost
from .timer import Timer

# Network, base optimizer, samples in a batch: from those that leave the GPU idle to those that fill it.
CASES = [
    ("MLP", "SGD momentum", 64),
    *(("ResNet", "SGD momentum", batch) for batch in (32, 128, 512, 2048)),
    ("ViT", "AdamW", 64),
    ("GPT", "AdamW", 8),
]

# Method and options of TrainStep.
DRIVERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SAM": (SAM, {}),
    "SAM, captured": (SAM, {"capture": True}),
    "SAMPa": (SAMPa, {}),
    "SAMPa, streams": (SAMPa, {"passes": "streams"}),
    "SAMPa, captured": (SAMPa, {"capture": True}),
    "SAMPa, streams, captured": (SAMPa, {"passes": "streams", "capture": True}),
    "Agnostic-SAM": (AgnosticSAM, {"validation": 0.25}),
    "Agnostic-SAM, streams, captured": (AgnosticSAM, {"validation": 0.25, "passes": "streams", "capture": True}),
}
BY_HAND = ("base optimizer", "per-tensor SAM")


def step_of(name: str, network: str, base_name: str, batch_size: int, device: torch.device) -> Callable[[], object]:
    """A training step in bfloat16 autocast, ready to be made again and again."""
    model, batch, _ = make(network, batch_size, large=device.type == "cuda")
    model.to(device)
    batch = (batch[0].to(device), batch[1].to(device))
    base, settings = BASES[base_name]
    settings = {**settings, **({"capturable": device.type == "cuda"} if base is torch.optim.AdamW else {})}
    if name in DRIVERS:
        method, options = DRIVERS[name]
        optimizer = method(model.parameters(), base, RHO, **settings)
        step = TrainStep(model, optimizer, loss_of, autocast=torch.bfloat16, **options)
        return lambda: step(batch)

    if name == "base optimizer":
        moves = [base(model.parameters(), fused=True, **settings).step]
    else:
        peer: Any = PerTensorSAM(model.parameters(), base, RHO, **settings)
        moves = [peer.first_step, peer.second_step]

    def step_by_hand() -> None:
        for move in moves:
            model.zero_grad()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
            move()

    return step_by_hand


def rows(
    networks: Sequence[str], steps: Sequence[str], device: torch.device, measure: Measure
) -> Iterator[records.Row]:
    """Every way to make a step, for each network."""
    for network, base, batch_size in (case for case in CASES if case[0] in networks):
        samples = make(network, batch_size, large=device.type == "cuda")[2]
        for name in steps:
            row = {"table": "training", "network": network, "base": base, "batch": batch_size, "step": name}
            try:
                step = step_of(name, network, base, batch_size, device)
                for _ in range(6):  # warm-up and recording
                    step()
                row |= measure(step)
                row["samples_per_second"] = 1e3 * samples / row["loop_ms"]
            except Exception as error:  # of whatever kind: compilers and drivers have their own
                row["error"] = first_line(error)
            step = None  # type: ignore[assignment]
            yield row


def main(words: Sequence[str] | None = None) -> None:
    names = list(dict.fromkeys(case[0] for case in CASES))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True, help="file that rows are added to")
    parser.add_argument("--networks", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", nargs="+", choices=[*BY_HAND, *DRIVERS], default=[*BY_HAND, *DRIVERS])
    parser.add_argument("--seconds", type=float, default=0.3, help="measuring time for each row, about")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    for row in rows(arguments.networks, arguments.steps, device, Timer(device, arguments.seconds)):
        records.append(arguments.records, row)
        if lost(device):
            sys.exit(LOST_DEVICE)


if __name__ == "__main__":
    main()
