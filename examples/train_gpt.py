"""A byte-level GPT on the source of Python's standard library, trained with SAM on one process or on many, by FSDP2.

    python examples/train_gpt.py
    torchrun --nproc-per-node 8 examples/train_gpt.py --width 1024 --depth 24 --micro-batches 4 --checkpoint folder

What changes for SAM is the optimizer and who makes the step: ``SAM(...)`` and ``TrainStep(...)``. Each rank perturbs,
restores and updates its own shards, along the norm of the whole model. Run again with the same folder to go on from
the last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sam_optim import SAM, TrainStep

VOCABULARY = 256


class GPT(nn.Module):
    """GPT-2's layout (Radford et al. 2019) over bytes."""

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask.to(hidden.dtype), is_causal=True)
        return self.head(self.norm(hidden))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float().flatten(0, 1), batch[1].flatten())


def load_text() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and every tenth file to validate on."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    parts = [b"".join(f.read_bytes() for i, f in enumerate(files) if (i % 10 == 0) == held) for held in (False, True)]
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)  # type: ignore[return-value]


def draw(text: Tensor, count: int, context: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows of the text, and the same windows one byte further on."""
    starts = torch.randint(len(text) - context - 1, (count,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([text[s : s + context + 1] for s in starts.tolist()]).long().to(device)
    return windows[:, :-1], windows[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 128, "depth": 4, "heads": 4, "context": 128, "batch": 16, "micro-batches": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=200, help="after which to stop")
    parser.add_argument("--schedule", type=int, default=200, help="steps over which the learning rate falls to zero")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rho", type=float, default=0.05, help="0 for AdamW alone")
    parser.add_argument("--every", type=int, default=50, help="steps between reports and checkpoints")
    parser.add_argument("--checkpoint", type=Path, help="folder to save to and to go on from")
    options = parser.parse_args()

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = GPT(options.width, options.depth, options.heads, options.context).to(device)
    if "RANK" in os.environ:
        mesh = init_device_mesh(device.type, (ranks,))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if device.type == "cuda" else None, reduce_dtype=torch.float32
        )
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=options.rho, lr=options.lr, weight_decay=0.1)
    step = TrainStep(model, optimizer, loss_of, micro_batches=options.micro_batches, max_grad_norm=1.0)

    def state() -> dict[str, object]:
        weights, of_optimizer = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": of_optimizer, "number": torch.tensor(number)}

    number = 0
    saves = sorted(options.checkpoint.glob("step-*")) if options.checkpoint else []
    if saves:
        saved = state()
        dcp.load(saved, checkpoint_id=saves[-1])
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        number = int(saved["number"])

    text, held_out = load_text()
    start, done = time.perf_counter(), 0
    while number < options.steps:
        lr = options.lr * min(1.0, (number + 1) / 20) * 0.5 * (1.0 + math.cos(math.pi * number / options.schedule))
        for group in optimizer.param_groups:
            group["lr"] = lr
        seed = number * ranks + rank
        step(draw(text, options.batch * options.micro_batches, options.context, seed, device))
        number, done = number + 1, done + 1
        if number % options.every == 0 or number == options.steps:
            with torch.no_grad():
                loss = loss_of(model, draw(held_out, 32, options.context, -1 - rank, device))
            if ranks > 1:
                torch.distributed.all_reduce(loss)
            if rank == 0:
                tokens = done * options.batch * options.micro_batches * options.context * ranks
                bits = loss.item() / ranks / math.log(2.0)
                speed = tokens / (time.perf_counter() - start)
                print(f"step {number}: {bits:.4f} bits a byte on other files, {speed:,.0f} bytes a second", flush=True)
            if options.checkpoint:
                dcp.save(state(), checkpoint_id=options.checkpoint / f"step-{number:08}")


if __name__ == "__main__":
    main()
    if torch.cuda.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
