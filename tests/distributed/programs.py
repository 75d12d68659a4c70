"""What the ranks run: each compares training on its part with training of the whole model by one process."""

from __future__ import annotations

import copy
import io
import math
import os
import re
import runpy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import sam_kernels as sk
from sam_optim import (
    SAM,
    InvalidSettingError,
    SAMPa,
    StabilityMonitor,
    TrainStep,
)

from ..optim.bases import ADAMW, SGD, UNFUSED, Base
from ..optim.cases import batches
from ..optim.methods import METHODS, named

# Sizes that two ranks cannot share out evenly: 5 and 1, where a rank has nothing at all.
SIZES = (7, 5, 1)

# Every method on its own, and what a base keeps for each weight: a momentum, two moments, and what it likes.
PAIRS = [
    *((method, SGD) for method in METHODS),
    *((named("SAM"), base) for base in (ADAMW, UNFUSED)),
    (named("FriendlySAM"), ADAMW),
    (named("MomentumSAM"), ADAMW),
    (named("MGSERSAM"), UNFUSED),
]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    first, second, third = SIZES
    return nn.Sequential(nn.Linear(first, second), nn.Tanh(), nn.Linear(second, third)).double()


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).squeeze(1) - batch[1]).pow(2).mean()


def sharded(model: nn.Sequential, mesh: DeviceMesh, **options: Any) -> nn.Sequential:
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close(model: nn.Module, wanted: nn.Module, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-11, "atol": 1e-13}
    for own, other in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(whole(own.detach()), other.detach(), **tolerance)


def of_rank(batch: tuple[Tensor, Tensor], rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    return batch[0].chunk(ranks)[rank], batch[1].chunk(ranks)[rank]


def data(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(x, y.double()) for x, y in batches(count)]


def train(step: TrainStep, rank: int, ranks: int, steps: int = 4) -> None:
    for batch, other in zip(data(steps), data(2 * steps)[steps:], strict=True):
        own, own_other = of_rank(batch, rank, ranks), of_rank(other, rank, ranks)
        step(own, own_other, memory_batch=own_other)


def fsdp_trains_like_one_process(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    for method, base in PAIRS:
        for options in ({}, {"reshard_after_forward": False}) if method is named("SAM") else ({},):
            model, wanted = sharded(make_model(), mesh, **options), make_model()
            optimizer = method.make(model, base)
            train(TrainStep(model, optimizer, loss_of), rank, ranks)
            train(TrainStep(wanted, method.make(wanted, base), loss_of), 0, 1)
            assert_close(model, wanted)
            for param in model.parameters():
                entries = optimizer.base_optimizer.state[param]
                assert all(isinstance(v, DTensor) for k, v in entries.items() if k != "step")


FSDP_1 = [
    *((named("SAM"), base) for base in (ADAMW, UNFUSED)),
    *((named(name), SGD) for name in ("ASAM", "GSAM", "SAMPa")),
]


def fsdp_of_version_1(rank: int, ranks: int) -> None:
    """Flat shards: refused without a process group, and with it trained like one process."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for use_orig_params in (False, True):
        for method, base in FSDP_1:
            if method.settings.get("adaptive") == "weights" and not use_orig_params:
                continue  # flat parameters have no names to choose by
            wanted = make_model()
            model = FullyShardedDataParallel(
                make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
            )
            try:
                refused = method.make(model, base)
                loss_of(model, of_rank(data(1)[0], rank, ranks)).backward()
                refused.first_step()
            except InvalidSettingError as error:
                assert "fully_shard" in str(error) and "process_group=" in str(error)
            else:
                raise AssertionError("FSDP 1 was not refused")
            model.zero_grad()
            optimizer = method.make(model, base, process_group=model.process_group)
            train(TrainStep(model, optimizer, loss_of), rank, ranks)
            train(TrainStep(wanted, method.make(wanted, base), loss_of), 0, 1)
            with FullyShardedDataParallel.summon_full_params(model):
                assert_close(model.module, wanted, rtol=1e-9, atol=1e-11)


def norms_are_global(rank: int, ranks: int) -> None:
    """Also where the weights are gathered, kept whole and changed between the passes."""
    model, wanted = sharded(make_model(), init_device_mesh("cpu", (ranks,))), make_model()
    for module in model.modules():
        if hasattr(module, "set_reshard_after_backward"):
            module.set_reshard_after_backward(False)
    [batch] = data(1)
    steps = [
        TrainStep(own, SAM(own.named_parameters(), torch.optim.SGD, rho=0.3, lr=0.1), loss_of)
        for own in (model, wanted)
    ]
    for step, own in zip(steps, (of_rank(batch, rank, ranks), batch), strict=True):
        step(own)
    norms = [step.optimizer.last_step.ascent.norms for step in steps]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0.0)
    assert_close(model, wanted)


def micro_batches_and_clipping(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    for name in ("SAM", "GSAM"):
        for options in ({"micro_batches": 3}, {"max_grad_norm": 0.1}):
            model, wanted = sharded(make_model(), mesh), make_model()
            for own, place in ((model, (rank, ranks)), (wanted, (0, 1))):
                train(TrainStep(own, named(name).make(own, SGD), loss_of, **options), *place)
            assert_close(model, wanted)
    # The same clipping by hand.
    model, wanted = sharded(make_model(), mesh), make_model()
    for own, place in ((model, (rank, ranks)), (wanted, (0, 1))):
        optimizer = named("GSAM").make(own, SGD)
        for batch in data(3):
            for p in optimizer.each_pass():
                loss_of(own, of_rank(batch, *place)).backward()
                if p.last:
                    optimizer.combine_gradients()
                    nn.utils.clip_grad_norm_(own.parameters(), 0.1)
    assert_close(model, wanted)
    # Each part's own perturbation: that of all ranks' parts together.
    model = sharded(make_model(), mesh)
    step = TrainStep(
        model,
        named("SAM").make(model, SGD),
        loss_of,
        micro_batches=2,
        perturbation="micro_batch",
    )
    train(step, rank, ranks)
    total = torch.stack([whole(p.detach()).sum() for p in model.parameters()])
    others = [torch.zeros_like(total) for _ in range(ranks)]
    torch.distributed.all_gather(others, total)
    assert all(torch.equal(other, total) for other in others)


def exceptions_and_infinities(rank: int, ranks: int) -> None:
    """A gradient that is not finite on one rank perturbs on none; restoring is exact."""
    model = sharded(make_model(), init_device_mesh("cpu", (ranks,)))
    optimizer = SAM(model.named_parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    before = [p.to_local().clone() for p in model.parameters()]
    [batch] = data(1)
    loss_of(model, of_rank(batch, rank, ranks)).backward()
    optimizer.first_step()
    assert any(not torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.restore()
    assert all(torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))
    loss_of(model, of_rank(batch, rank, ranks)).backward()
    if rank == ranks - 1:
        next(model.parameters()).grad.to_local().fill_(math.inf)
    optimizer.first_step()
    assert not optimizer.last_step.ascent.finite
    assert all(torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.restore()
    try:
        StabilityMonitor(model, optimizer, loss_of).measure(of_rank(batch, rank, ranks))
    except sk.UnsupportedTensorError as error:
        assert "spread over ranks" in str(error)
    else:
        raise AssertionError("a sharded model was not refused")
    for option in ({"passes": "streams"}, {"capture": True}):
        try:
            TrainStep(model, SAMPa(model.parameters(), torch.optim.SGD, lr=0.1), loss_of, **option)
        except InvalidSettingError:
            continue
        raise AssertionError(f"{option} was not refused")


def mixed_precision(rank: int, ranks: int) -> None:
    """Passes in bfloat16 on gathered copies; the shards are perturbed and updated in float32, nothing is lost."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(make_model().float(), init_device_mesh("cpu", (ranks,)), mp_policy=policy)
    seen: list[torch.dtype] = []
    model[0].register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    rho = 1e-3  # spread over 46 weights: less than a rounding to bfloat16 of most of them
    optimizer = SAM(model.named_parameters(), torch.optim.SGD, rho=rho, lr=0.1)
    wanted = make_model().float()
    reference = SAM(wanted.named_parameters(), torch.optim.SGD, rho=rho, lr=0.1)
    before = [whole(p.detach()).clone() for p in model.parameters()]
    [batch] = [(x.float(), y.float()) for x, y in data(1)]
    for own, steps, part in ((model, optimizer, of_rank(batch, rank, ranks)), (wanted, reference, batch)):
        loss_of(own, part).backward()
        steps.first_step(zero_grad=True)
        moved = [whole(p.detach()) - b for p, b in zip(own.parameters(), before, strict=True)]
        length = torch.cat([m.flatten() for m in moved]).norm()
        torch.testing.assert_close(length, torch.tensor(rho), rtol=1e-3, atol=0.0)
        loss_of(own, part).backward()
        steps.second_step(zero_grad=True)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_close(model, wanted, rtol=0.0, atol=5e-3)

    masters = SAM(model.named_parameters(), torch.optim.SGD, rho=rho, lr=0.1, master_weights=True)
    loss_of(model, of_rank(batch, rank, ranks)).backward()
    try:
        masters.first_step()
    except InvalidSettingError as error:
        assert "MixedPrecisionPolicy" in str(error)
    else:
        raise AssertionError("masters of a sharded model were not refused")


def two_dimensions(rank: int, ranks: int) -> None:
    """Placements side by side: sharded along one or both dimensions of a mesh, replicated, and plain tensors."""
    mesh = init_device_mesh("cpu", (2, ranks // 2))
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(4)]
    gradients = [torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(4)]
    placements = [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Replicate(), Replicate())]

    def spread(tensors: list[Tensor]) -> list[Tensor]:
        own = [t.clone() for t in tensors]
        return [*(distribute_tensor(t, mesh, p) for t, p in zip(own, placements, strict=False)), own[-1]]

    params, xs = spread(full), [spread(gradients), spread(full)]
    wanted, wanted_xs = [t.clone() for t in full], [gradients, full]
    plan, whole_plan = (sk.Plan(tensors, geometry=[None, 0.1, None, 0.0]) for tensors in (params, wanted))
    torch.testing.assert_close(sk.gram(xs, plan), sk.gram(wanted_xs, whole_plan), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(sk.gram(xs), sk.gram(wanted_xs), rtol=1e-12, atol=0.0)
    for own_plan, own_xs in ((plan, xs), (whole_plan, wanted_xs)):
        snapshot = sk.Snapshot(own_plan)
        sk.ascent_(own_plan, own_xs, scale=0.3, snapshot=snapshot)
        base = sk.SGD([sk.SGDSettings(0.1)], first=bytearray(4))
        sk.descent_(own_plan, own_xs, base, rule=sk.Deflected(alpha=0.4), snapshot=snapshot)
    for own, other in zip(params, wanted, strict=True):
        torch.testing.assert_close(whole(own), other, rtol=1e-12, atol=1e-13)
    wrong = distribute_tensor(full[0].clone(), mesh, (Shard(1), Shard(0)))
    try:
        sk.perturb_(plan, [[wrong, None, None, None]], [1.0])
    except sk.UnsupportedTensorError as error:
        assert "redistribute" in str(error)
    else:
        raise AssertionError("another placement was not refused")


def checkpoints(rank: int, ranks: int) -> None:
    """By torch.distributed.checkpoint's state dicts, and by the optimizer's own."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    mesh = init_device_mesh("cpu", (ranks,))
    for method, base, own_dict in (
        (named("SAM"), ADAMW, False),
        (named("SAM"), SGD, True),
        (named("FriendlySAM"), SGD, True),
        (named("FriendlySAM"), UNFUSED, False),
    ):
        model = sharded(make_model(), mesh)
        optimizer = method.make(model, base)
        train(TrainStep(model, optimizer, loss_of), rank, ranks)
        weights = copy.deepcopy(model.state_dict())
        if own_dict:
            saved = copy.deepcopy(optimizer.state_dict())
        else:
            saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        train(TrainStep(model, optimizer, loss_of), rank, ranks)

        resumed = sharded(make_model(), mesh)
        resumed.load_state_dict(weights)
        optimizer = method.make(resumed, base)
        if own_dict:
            optimizer.load_state_dict(saved)
        else:
            set_optimizer_state_dict(resumed, optimizer, saved)
        train(TrainStep(resumed, optimizer, loss_of), rank, ranks)
        for own, other in zip(resumed.parameters(), model.parameters(), strict=True):
            assert torch.equal(own.to_local(), other.to_local())


def data_parallel(rank: int, ranks: int) -> None:
    """DistributedDataParallel: the step of the whole batch, and replicas that stay equal bit for bit."""
    model, wanted = make_model(), make_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for own, place in ((wrapped, (rank, ranks)), (wanted, (0, 1))):
        step = TrainStep(own, named("SAM").make(own, SGD), loss_of, micro_batches=2)
        train(step, *place)
    assert_close(model, wanted)
    for param in model.parameters():
        others = [torch.zeros_like(param) for _ in range(ranks)]
        torch.distributed.all_gather(others, param.detach())
        assert all(torch.equal(other, param) for other in others)


def gradients_in_buckets(rank: int, ranks: int) -> None:
    """Where gradients are views of its buckets, DistributedDataParallel writes the next over those of a pass."""
    for name in ("GSAM", "WSAM", "CRSAM", "LookSAM", "SAMPa", "AgnosticSAM", "MGSERSAM", "SAM"):
        method = named(name)
        model, wanted = make_model(), make_model()
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        for own, place in ((wrapped, (rank, ranks)), (wanted, (0, 1))):
            train(TrainStep(own, method.make(own, SGD), loss_of), *place)
        assert_close(model, wanted)


def zero_redundancy(rank: int, ranks: int) -> None:
    """ZeroRedundancyOptimizer as the base: each rank updates its share of the weights, all perturb all of them."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit

    for name, base in (("SAM", SGD), ("SAM", ADAMW), ("GSAM", SGD), ("SAM", UNFUSED)):
        cls, settings = named(name).cls, named(name).settings
        model, wanted = make_model(), make_model()
        wrapped = nn.parallel.DistributedDataParallel(model)
        zero = ZeroRedundancyOptimizer(wrapped.parameters(), base.cls, **base.settings)
        optimizer = cls(wrapped.parameters(), zero, **settings)
        schedulers = []
        for own, place, opt in (
            (wrapped, (rank, ranks), optimizer),
            (wanted, (0, 1), named(name).make(wanted, base)),
        ):
            schedulers.append(torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5))
            for _ in range(2):  # a learning rate of the optimizer's reaches the shares
                train(TrainStep(own, opt, loss_of), *place)
                schedulers[-1].step()
        assert_close(model, wanted)
        # Its state is gathered on one rank before it is saved, and each rank takes its share of it when it loads.
        zero.consolidate_state_dict(to=0)
        saved = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
        torch.distributed.broadcast_object_list(saved)
        again = copy.deepcopy(model)
        resumed = cls(again.parameters(), ZeroRedundancyOptimizer(again.parameters(), base.cls, lr=1.0), rho=0.5)
        resumed.load_state_dict(saved[0])
        train(TrainStep(wrapped, optimizer, loss_of), rank, ranks)
        train(TrainStep(nn.parallel.DistributedDataParallel(again), resumed, loss_of), rank, ranks)
        assert_close(again, model, rtol=0.0, atol=0.0)


def grad_scaler(rank: int, ranks: int) -> None:
    """An overflow that one rank alone sees, in either gradient: no rank perturbs or updates, and all scales fall."""
    mesh = init_device_mesh("cpu", (ranks,))
    for base in (SGD, ADAMW, UNFUSED):
        for overflow_in in (None, 0, 1):
            model, wanted = sharded(make_model().float(), mesh), make_model().float()
            scale = _scaled_steps(model, base, overflow_in, rank, ranks)
            assert scale == _scaled_steps(wanted, base, overflow_in, 0, 1)
            assert (scale < 1024.0) == (overflow_in == 1)
            assert_close(model, wanted, rtol=1e-4, atol=1e-5)
        replica, wanted = make_model().float(), make_model().float()
        _scaled_steps(nn.parallel.DistributedDataParallel(replica), base, None, rank, ranks)
        _scaled_steps(wanted, base, None, 0, 1)
        assert_close(replica, wanted, rtol=1e-4, atol=1e-5)


def _scaled_steps(model: nn.Module, base: Base, overflow_in: int | None, rank: int, ranks: int) -> float:
    """Three steps of SAM; in the second a gradient of the last rank overflows. Returns the scale that is left."""
    optimizer = named("SAM").make(model, base)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, batch in enumerate(data(3)):
        x, y = of_rank((batch[0].float(), batch[1].float()), rank, ranks)
        before = [whole(p.detach()).clone() for p in model.parameters()]
        for index in range(2):
            optimizer.zero_grad()
            loss = loss_of(model, (x, y))
            scaler.scale(loss).backward()
            if number == 1 and index == overflow_in and rank == ranks - 1:
                gradient = next(model.parameters()).grad
                (gradient.to_local() if isinstance(gradient, DTensor) else gradient).fill_(math.inf)
            if index == 0:
                optimizer.first_step()
        scaler.step(optimizer)
        scaler.update()
        skipped = number == 1 and overflow_in == 1
        assert optimizer.last_step.updated != skipped
        unchanged = all(torch.equal(whole(p.detach()), b) for p, b in zip(model.parameters(), before, strict=True))
        assert unchanged == skipped
    return scaler.get_scale()


def train_gpt_example(rank: int, ranks: int, example: str, folder: str) -> None:
    """A run that goes on from a checkpoint ends where one without a stop does, and learns what one process learns."""
    from contextlib import redirect_stdout

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    main = runpy.run_path(example)["main"]

    def losses(*arguments: str) -> list[str]:
        sizes = "--width 32 --depth 2 --context 32 --every 2 --schedule 8 --lr 0.01"
        sys.argv = [example, *sizes.split(), *arguments]
        with redirect_stdout(io.StringIO()) as printed:
            main()
        return re.findall(r": ([\d.]+) bits", printed.getvalue())

    straight = losses("--steps", "6", "--micro-batches", "2", "--batch", "2")
    first = losses("--steps", "4", "--micro-batches", "2", "--batch", "2", "--checkpoint", folder)
    rest = losses("--steps", "6", "--micro-batches", "2", "--batch", "2", "--checkpoint", folder)
    assert straight == [*first, *rest], (straight, first, rest)
    if rank == 0:
        assert len(straight) == 3
        assert float(straight[-1]) < float(straight[0]) - 0.1


def mmengine_replicas(rank: int, ranks: int) -> None:
    """SharpnessAwareHook around MMEngine's DistributedDataParallel, which has a train_step of its own."""
    from types import SimpleNamespace

    from mmengine.model import BaseModel, MMDistributedDataParallel
    from mmengine.optim import OptimWrapper

    from sam_optim.openmmlab import SharpnessAwareHook

    class Regressor(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def forward(self, x: Tensor, y: Tensor, mode: str = "loss") -> dict[str, Tensor]:
            return {"loss": (self.net(x).squeeze(1) - y).pow(2).mean()}

    for method in (named("SAM"), named("GSAM"), named("SAMPa")):
        model, wanted = MMDistributedDataParallel(Regressor()), make_model()
        optimizer = method.make(model, SGD)
        wrapper = OptimWrapper(optimizer, accumulative_counts=2, clip_grad={"max_norm": 0.5})
        runner = SimpleNamespace(model=model, optim_wrapper=wrapper)
        with SharpnessAwareHook()._installed(runner, optimizer):
            for batch in data(4):
                for part in range(2):
                    x, y = of_rank(batch, part * ranks + rank, 2 * ranks)
                    model.train_step({"x": x, "y": y}, optim_wrapper=wrapper)
        step = TrainStep(wanted, method.make(wanted, SGD), loss_of, max_grad_norm=0.5)
        for batch in data(4):
            step(batch)
        assert_close(model, wanted)


def trainer_replicas(rank: int, ranks: int, folder: str) -> None:
    """Hugging Face's Trainer lets replicas meet in a window's last micro-batch; SAMPa's first pass comes before."""
    import os

    # The ranks have met already; accelerate wants to be told of an address all the same.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import transformers

    from sam_optim import SharpnessAwareTrainerMixin

    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.net(x).squeeze(1) - labels).pow(2).mean()}

    class InOrder(SharpnessAwareTrainerMixin, transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    entries = [{"x": a, "labels": b} for x, y in data(3) for a, b in zip(x, y, strict=True)]
    samples = len(entries) // 3
    for method in (named("GSAM"), named("SAMPa")):
        model, wanted = Regressor(), make_model()
        options = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=samples // (2 * ranks),
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            max_grad_norm=0.5,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        optimizer = method.make(model, SGD)
        InOrder(model, options, train_dataset=entries, optimizers=(optimizer, None)).train()
        step = TrainStep(wanted, method.make(wanted, SGD), loss_of, max_grad_norm=0.5)
        for batch in data(3):
            step(batch)
        assert_close(model.net, wanted, rtol=1e-4, atol=1e-5)
