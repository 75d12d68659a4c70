"""What the ranks run whose parts of the model are plain tensors: stages of a pipeline, and experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import sam_kernels as sk
from sam_kernels import Peers
from sam_optim import GSAM, SAM, InvalidSettingError, StepOrderError, TrainStep

from ..optim.bases import ADAMW, SGD
from ..optim.methods import Method, named
from .programs import PAIRS, assert_close, data, loss_of, make_model, of_rank

STEPS = 4


def pipeline_stages(rank: int, ranks: int) -> None:
    """Every method on two stages, driven by torch's pipeline schedules, as by one process."""
    for method, base in PAIRS:
        whole, wanted = make_model(), make_model()
        own = [whole[:2], whole[2:]][rank]
        optimizer = method.make(own, base, process_group=torch.distributed.group.WORLD)
        stage = PipelineStage(own, rank, ranks, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda y, t: (y.squeeze(1) - t).pow(2).mean())
        reference = method.make(wanted, base)
        batches = data(STEPS)
        for number, batch in enumerate(batches):
            names = {"train": batch, "previous": batches[number - 1], "validation": batches[-1], "memory": batches[-1]}
            for p in optimizer.each_pass():
                x, y = names[p.data]
                _ = schedule.step(x) if rank == 0 else schedule.step(target=y)
            for p in reference.each_pass():
                loss_of(wanted, names[p.data]).backward()
        assert optimizer.last_step.updated == reference.last_step.updated
        assert_close(own, [wanted[:2], wanted[2:]][rank])


class _Copied(torch.autograd.Function):
    """To all experts: their gradients are summed on the way back."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient)
        return gradient


class _Added(torch.autograd.Function):
    """From all experts."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Mixture(nn.Module):
    """A layer that every rank has, then the sum of experts, of which a rank has some."""

    def __init__(self, experts: slice, spread: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(7, 5).double()
        self.experts = nn.ModuleList([nn.Linear(5, 1).double() for _ in range(2)][experts])
        self.spread = spread

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(x).tanh()
        if not self.spread:
            return torch.stack([expert(x) for expert in self.experts]).sum(0)
        copied = _Copied.apply(x)
        return _Added.apply(torch.stack([expert(copied) for expert in self.experts]).sum(0))  # type: ignore[no-any-return]


def experts(rank: int, ranks: int) -> None:
    """Of the layer that both ranks have, one counts; the norm, also that of clipping, is the whole model's."""
    for method in (
        Method(SAM, {"rho": 0.3}),
        Method(SAM, {"rho": 0.3, "adaptive": True}),
        Method(GSAM, {"rho": 0.3}),
    ):
        model, wanted = Mixture(slice(rank, rank + 1), spread=True), Mixture(slice(2), spread=False)
        expert = set(model.experts.parameters())
        optimizer = method.make(
            model,
            SGD,
            process_group=torch.distributed.group.WORLD,
            counts_in_norm=lambda p, expert=expert: p in expert or rank == 0,
        )
        steps = [
            TrainStep(model, optimizer, loss_of, max_grad_norm=0.3),
            TrainStep(wanted, method.make(wanted, SGD), loss_of, max_grad_norm=0.3),
        ]
        for batch in data(STEPS):
            for step in steps:
                step(batch)
        norms = [step.optimizer.last_step.ascent.norms for step in steps]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-11, atol=0.0)
        assert_close(model.dense, wanted.dense)
        assert_close(model.experts[0], wanted.experts[rank])


def an_infinity_on_one_rank(rank: int, ranks: int) -> None:
    """No rank perturbs, and no rank makes an update that needs a Gram matrix."""
    group = torch.distributed.group.WORLD
    for rule in (sk.Normalized(), lambda gram: 1.0 / gram.diagonal().sqrt()):
        params = [torch.full((3,), 2.0), torch.full((2,), 3.0)]
        gradients = [torch.ones(3), torch.full((2,), torch.inf if rank == 1 else 1.0)]
        plan = sk.Plan(params, peers=Peers(group, [True, True]))
        snapshot = sk.Snapshot(plan)
        assert not sk.ascent_(plan, [gradients], rule=rule, snapshot=snapshot).finite
        report = sk.descent_(
            plan,
            [gradients],
            sk.SGD([sk.SGDSettings(lr=0.1)], [None, None], bytearray(b"\1\1")),
            rule=rule,
            snapshot=snapshot,
        )
        assert not report.finite
        assert torch.equal(params[0], torch.full((3,), 2.0)) and torch.equal(params[1], torch.full((2,), 3.0))


def grad_scaler_is_refused(rank: int, ranks: int) -> None:
    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, process_group=torch.distributed.group.WORLD)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(InvalidSettingError, match="process_group"):
        TrainStep(model, optimizer, loss_of, scaler=scaler)
    with pytest.raises(StepOrderError, match="process_group"):
        for _ in optimizer.each_pass(step=lambda: scaler.step(optimizer)):
            scaler.scale(loss_of(model, data(1)[0])).backward()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def pipeline_of_shards(rank: int, ranks: int) -> None:
    """Two stages, each FSDP2's over two ranks: sums over shards within a stage, then over stages."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))
    stage_number, shard = mesh.get_coordinate() or (0, 0)
    for method, base in ((named("SAM"), SGD), (named("GSAM"), ADAMW)):
        whole, wanted = make_model(), make_model()
        own = [whole[:2], whole[2:]][stage_number]
        fully_shard(own, mesh=mesh["shard"])
        optimizer = method.make(own, base, process_group=mesh.get_group("stage"))
        stage = PipelineStage(own, stage_number, 2, torch.device("cpu"), group=mesh.get_group("stage"))
        schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda y, t: (y.squeeze(1) - t).pow(2).mean())
        reference = method.make(wanted, base)
        for batch in data(STEPS):
            x, y = of_rank(batch, shard, 2)
            for _ in optimizer.each_pass():
                _ = schedule.step(x) if stage_number == 0 else schedule.step(target=y)
            for _ in reference.each_pass():
                loss_of(wanted, batch).backward()
        assert_close(own, [wanted[:2], wanted[2:]][stage_number])
