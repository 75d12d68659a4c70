"""What ranks in fresh processes save and load: torch.distributed.checkpoint, and accelerate with FSDP2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from sam_optim import SharpnessAwareOptimizer, TrainStep

from ..optim.bases import ADAMW, PLAIN_SGD, SGD, UNFUSED
from ..optim.methods import named
from .programs import loss_of, make_model, sharded, train, whole

CASES = [
    (named("FriendlySAM"), ADAMW, StateDictOptions()),
    (named("VaSSO"), SGD, StateDictOptions(flatten_optimizer_state_dict=True)),
    (named("LookSAM"), UNFUSED, StateDictOptions()),
    (named("AgnosticSAM smoothed"), PLAIN_SGD, StateDictOptions()),
    (named("FriendlySAM"), ADAMW, StateDictOptions(full_state_dict=True)),
]


# Of FSDP's state dicts in accelerate.
KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")


def _make(number: int, ranks: int) -> tuple[nn.Module, SharpnessAwareOptimizer]:
    model = make_model()
    if ranks > 1:
        model = sharded(model, init_device_mesh("cpu", (ranks,)))
    method, base, _ = CASES[number]
    return model, method.make(model, base)


def _save(model: nn.Module, optimizer: SharpnessAwareOptimizer, number: int, folder: str) -> None:
    model_state, state = get_state_dict(model, optimizer, options=CASES[number][2])
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=f"{folder}/{number}")


def save(rank: int, ranks: int, folder: str) -> None:
    """Trains, saves, goes on, and leaves the weights that a resumed run is to come to."""
    for number in range(len(CASES)):
        model, optimizer = _make(number, ranks)
        train(TrainStep(model, optimizer, loss_of), rank, ranks)
        optimizer.zero_grad()
        _save(model, optimizer, number, folder)
        train(TrainStep(model, optimizer, loss_of), rank, ranks)
        wanted = [whole(p.detach()) for p in model.parameters()]
        if rank == 0:
            torch.save(wanted, f"{folder}/wanted{number}.pt")


def load(rank: int, ranks: int, folder: str, again: str | None = None) -> None:
    """Loads in a process, and with a number of ranks, of its own; may save what it has loaded, before it goes on."""
    for number in range(len(CASES)):
        model, optimizer = _make(number, ranks)
        options = CASES[number][2]
        model_state, state = get_state_dict(model, optimizer, options=options)
        saved = {"model": model_state, "optimizer": state}
        dcp.load(saved, checkpoint_id=f"{folder}/{number}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=options,
        )
        if again is not None:
            _save(model, optimizer, number, again)
        train(TrainStep(model, optimizer, loss_of), rank, ranks)
        wanted = torch.load(f"{Path(folder) if again else Path(folder).parent}/wanted{number}.pt")
        for p, w in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(whole(p.detach()), w, rtol=1e-11, atol=1e-13)


def _accelerated(kind: str, rank: int, ranks: int) -> tuple[Any, Any, nn.Module, Any]:
    """What accelerate prepares for FSDP2; on CPUs it does not, so that the model is sharded by hand."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    # Where accelerate looks, although the process group is there.
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in place.items()})
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == ranks
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    model, optimizer = _make(0, ranks)
    return accelerator, plugin, model, accelerator.prepare_optimizer(optimizer)


def save_by_accelerate(rank: int, ranks: int, folder: str) -> None:
    """By what ``Accelerator.save_state`` and the Trainer of transformers call, with the wrapped optimizer."""
    from accelerate.utils.fsdp_utils import save_fsdp_optimizer

    for kind in KINDS:
        accelerator, plugin, model, optimizer = _accelerated(kind, rank, ranks)
        train(TrainStep(model, optimizer.optimizer, loss_of), rank, ranks)
        optimizer.zero_grad()
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, f"{folder}/{kind}")
        torch.save(model.state_dict(), f"{folder}/{kind}/weights{rank}.pt")
        train(TrainStep(model, optimizer.optimizer, loss_of), rank, ranks)
        torch.save(model.state_dict(), f"{folder}/{kind}/wanted{rank}.pt")


def load_by_accelerate(rank: int, ranks: int, folder: str) -> None:
    """Resumes bit for bit."""
    from accelerate.utils.fsdp_utils import load_fsdp_optimizer

    for kind in KINDS:
        accelerator, plugin, model, optimizer = _accelerated(kind, rank, ranks)
        model.load_state_dict(torch.load(f"{folder}/{kind}/weights{rank}.pt", weights_only=False))
        load_fsdp_optimizer(plugin, accelerator, optimizer, model, f"{folder}/{kind}")
        train(TrainStep(model, optimizer.optimizer, loss_of), rank, ranks)
        wanted = torch.load(f"{folder}/{kind}/wanted{rank}.pt", weights_only=False)
        for name, own in model.state_dict().items():
            assert torch.equal(own.to_local(), wanted[name].to_local()), name
