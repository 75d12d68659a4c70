"""TrainStep: the same steps as by hand, and what it adds to them."""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from sam_kernels import Deflected
from sam_optim import (
    CRSAM,
    SAM,
    AgnosticSAM,
    InvalidSettingError,
    Pass,
    SAMPa,
    StepOrderError,
    TrainStep,
    Update,
    frozen_batch_norm,
    split_batch,
)
from sam_optim.training.streams import OneLane

from .cases import assert_same, batches, loss_of, make_net, weights_of

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}

METHODS = {
    "SAM": lambda m: SAM(m.parameters(), torch.optim.SGD, rho=0.1, **SGD),
    "ASAM": lambda m: SAM(m.parameters(), torch.optim.AdamW, rho=0.5, adaptive=True, lr=0.01),
    "AgnosticSAM": lambda m: AgnosticSAM(m.parameters(), torch.optim.SGD, rho_train=0.1, smoothing=0.5, **SGD),
    "AlignSAM": lambda m: AgnosticSAM(m.parameters(), torch.optim.SGD, rho_train=0.1, variant="align", **SGD),
    "SAMPa": lambda m: SAMPa(m.parameters(), torch.optim.SGD, rho=0.1, **SGD),
    "unfused": lambda m: SAM(m.parameters(), torch.optim.RAdam, rho=0.1, lr=0.01),
    "rho=0": lambda m: SAM(m.parameters(), torch.optim.SGD, rho=0.0, **SGD),
}


def drive_by_hand(model, optimizer, train, validation):
    """Every method in one loop."""
    previous, losses = None, []
    for batch, other in zip(train, validation, strict=True):
        chosen = {"train": batch, "validation": other, "previous": previous}
        first = None
        for p in optimizer.each_pass():
            loss = loss_of(model, chosen[p.data])
            loss.backward()
            if p.data == "train" and not p.perturbed and first is None:
                first = loss.detach()
        losses.append(first)
        previous = batch
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_loop_by_hand(name):
    results = []
    for by_hand in (True, False):
        model = make_net()
        optimizer = METHODS[name](model)
        train, validation = batches(5), batches(5, size=4)
        if by_hand:
            losses = drive_by_hand(model, optimizer, train, validation)
        else:
            step = TrainStep(model, optimizer, loss_of)
            losses = [step(*pair) for pair in zip(train, validation, strict=True)]
            assert not any(loss.requires_grad for loss in losses)
            assert all(p.grad is None for p in model.parameters())
        results.append([*weights_of(model), *losses])
    assert_same(*results)


def test_a_first_step_without_a_pass():
    """SAMPa with a first gradient of zero: the batch of that step is still the next step's previous one."""
    results = []
    for by_hand in (True, False):
        model = make_net()
        optimizer = SAMPa(model.parameters(), torch.optim.SGD, rho=0.1, warm_start="zero", **SGD)
        if by_hand:
            drive_by_hand(model, optimizer, batches(4), batches(4))
        else:
            step = TrainStep(model, optimizer, loss_of)
            losses = [step(batch) for batch in batches(4)]
            assert losses[0] is None and losses[1] is not None
        results.append(weights_of(model))
    assert_same(*results)


def test_a_method_from_elsewhere():
    """Any generator of passes, without a change."""
    path = Path(__file__).parents[2] / "examples/own_method.py"
    if not path.exists():
        pytest.skip("the examples are not here")
    specification = importlib.util.spec_from_file_location("own_method", path)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    method = example.MongeSAM
    results = []
    for by_hand in (True, False):
        model = make_net()
        optimizer = method(model.parameters(), torch.optim.SGD, **SGD)
        if by_hand:
            drive_by_hand(model, optimizer, batches(3), batches(3))
        else:
            step = TrainStep(model, optimizer, loss_of)
            for batch in batches(3):
                step(batch)
        results.append(weights_of(model))
    assert_same(*results)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_dropout_and_batch_norm(micro_batches):
    """As the closure driver: the same masks in both passes, statistics once."""
    results = []
    for closure in (True, False):
        model = make_net(dropout=0.5, batch_norm=True)
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, **SGD)
        seen = []
        model.layers[3].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out == 0))
        torch.manual_seed(5)
        if closure and micro_batches == 1:
            for batch in batches(4):
                frozen = model.layers[1]

                def run(batch=batch, model=model, optimizer=optimizer, frozen=frozen):
                    optimizer.zero_grad()
                    statistics = {k: v.clone() for k, v in frozen._buffers.items()}
                    perturbed = optimizer.waiting.perturbed
                    loss_of(model, batch).backward()
                    if perturbed:
                        for key, value in statistics.items():
                            frozen._buffers[key].copy_(value)

                optimizer.step(run, closure_runs="every_pass")
        else:
            step = TrainStep(model, optimizer, loss_of, micro_batches=micro_batches)
            for batch in batches(4):
                step(batch)
        half = micro_batches
        for start in range(0, len(seen), 2 * half):
            for a, b in zip(seen[start : start + half], seen[start + half : start + 2 * half], strict=True):
                assert torch.equal(a, b)
        assert model.layers[1].num_batches_tracked == 4 * (1 if closure and micro_batches == 1 else micro_batches)
        results.append([*weights_of(model), *(b.clone() for b in model.buffers())])
    assert_same(*results)


def test_sampa_repeats_the_draws_of_the_previous_batch():
    model = make_net(dropout=0.5)
    optimizer = METHODS["SAMPa"](model)
    seen = []
    model.layers[2].register_forward_hook(lambda module, args, out: seen.append(out == 0))
    step = TrainStep(model, optimizer, loss_of)
    for batch in batches(3):
        step(batch)
    first, previous_1, second, previous_2, third = seen
    assert torch.equal(first, previous_1) and torch.equal(second, previous_2)
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize("name", ["SAM", "AgnosticSAM", "SAMPa"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_micro_batches_make_the_step_of_the_whole_batch(name, clip):
    """Parts of unequal size count by their samples."""
    results = []
    for count in (1, 5):
        model = make_net()
        step = TrainStep(model, METHODS[name](model), loss_of, micro_batches=count, max_grad_norm=clip)
        losses = [step(a, b) for a, b in zip(batches(4), batches(4, size=7), strict=True)]
        results.append([*weights_of(model), *losses])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_ranks_reduce_once_a_pass(tmp_path):
    """Under DistributedDataParallel with micro-batches; the step is that of the plain model."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        results, reductions = [], []
        for wrapped in (False, True):
            model = make_net()
            optimizer = METHODS["SAM"](model)
            if wrapped:
                model = nn.parallel.DistributedDataParallel(model)

                def hook(state, bucket):
                    reductions.append(None)
                    future = torch.futures.Future()
                    future.set_result(bucket.buffer())
                    return future

                model.register_comm_hook(None, hook)
            step = TrainStep(model, optimizer, loss_of, micro_batches=3)
            for batch in batches(3):
                step(batch)
            results.append(weights_of(model))
        assert len(reductions) == 3 * 2
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    finally:
        torch.distributed.destroy_process_group()


def test_m_sam():
    """Each micro-batch has a perturbation of its own; the gradients of their ends are averaged."""
    model, oracle = make_net(), make_net()
    step = TrainStep(
        model,
        SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05),
        loss_of,
        micro_batches=3,
        perturbation="micro_batch",
    )
    for batch in batches(3, size=10):
        losses = step(batch)
        total = [torch.zeros_like(p) for p in oracle.parameters()]
        mean = 0.0
        for part in split_batch(batch, 3):
            share = len(part[1]) / 10
            params = list(oracle.parameters())
            before = [p.detach().clone() for p in params]
            loss = loss_of(oracle, part)
            mean += share * loss.item()
            gradients = torch.autograd.grad(loss, params)
            norm = torch.sqrt(sum((g**2).sum() for g in gradients))
            with torch.no_grad():
                for p, g in zip(params, gradients, strict=True):
                    p.add_(0.1 * g / norm)
            for t, g in zip(total, torch.autograd.grad(loss_of(oracle, part), params), strict=True):
                t.add_(share * g)
            with torch.no_grad():
                for p, b in zip(params, before, strict=True):
                    p.copy_(b)
        with torch.no_grad():
            for p, t in zip(oracle.parameters(), total, strict=True):
                p.sub_(0.05 * t)
        assert losses.item() == pytest.approx(mean)
    for a, b in zip(weights_of(model), weights_of(oracle), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_clipping_is_of_the_final_gradient():
    results = []
    for by_hand in (True, False):
        model = make_net()
        optimizer = METHODS["SAM"](model)
        if by_hand:
            for batch in batches(3):
                loss_of(model, batch).backward()
                optimizer.first_step(zero_grad=True)
                loss_of(model, batch).backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                assert norm > 0.05
                optimizer.second_step(zero_grad=True)
        else:
            step = TrainStep(model, optimizer, loss_of, max_grad_norm=0.05)
            for batch in batches(3):
                step(batch)
        results.append(weights_of(model))
    assert_same(*results)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}, {"micro_batches": 2, "perturbation": "micro_batch"}])
def test_grad_scaler(clip, options):
    """A power of two as scale changes nothing; an overflow skips the update and halves the scale."""
    results = []
    for scaled in (False, True):
        model = make_net()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100) if scaled else None
        step = TrainStep(model, METHODS["SAM"](model), loss_of, scaler=scaler, max_grad_norm=clip, **options)
        for batch in batches(3):
            step(batch)
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    before = weights_of(model)
    calls = []

    def overflowing(model, batch):
        calls.append(None)
        return loss_of(model, batch) * (float("inf") if len(calls) == 2 * options.get("micro_batches", 1) else 1.0)

    step.loss_fn = overflowing
    step(batches(1)[0])
    assert_same(weights_of(model), before)
    assert scaler.get_scale() == 512.0
    step.loss_fn = loss_of
    step(batches(1)[0])
    assert not torch.equal(weights_of(model)[0], before[0])


@pytest.mark.parametrize("name", ["SAM", "AgnosticSAM", "SAMPa"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}])
def test_an_exception_leaves_weights_and_statistics(name, number, options):
    model = make_net(batch_norm=True)
    calls = []

    def failing(model, batch):
        calls.append(None)
        loss = loss_of(model, batch)
        if len(calls) == number:
            raise KeyboardInterrupt
        return loss

    step = TrainStep(model, METHODS[name](model), loss_of, **options)
    train, validation = batches(3), batches(3)
    step(train[0], validation[0])
    before = [*weights_of(model), *(b.clone() for b in model.buffers())]
    step.loss_fn = failing
    try:
        step(train[1], validation[1])
    except KeyboardInterrupt:
        assert_same([*weights_of(model), *model.buffers()], before)
        assert all(p.grad is None for p in model.parameters())
    else:
        assert len(calls) < number
    step.loss_fn = loss_of
    step(train[2], validation[2])


class _Deflecting(SAM):
    """A method whose descent needs a Gram matrix."""

    perturbs_micro_batches = True

    def passes(self):
        g = yield Pass(kept=True)
        self.ascend(g, rule=self._rule, scale=self.radii())
        g_plus = yield Pass(perturbed=True)
        yield Update(g_plus, g, rule=Deflected(alpha=0.3))


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 1.0}, {"micro_batches": 2, "perturbation": "micro_batch"}], ids=str
)
def test_a_gram_matrix_that_is_not_finite_updates_nothing(options):
    """Not the momentum either, whoever stands between the method and its update."""
    model = make_net()
    optimizer = _Deflecting(model.parameters(), torch.optim.SGD, rho=0.1, **SGD)
    step = TrainStep(model, optimizer, loss_of, **options)
    step(batches(1)[0])
    before = [*weights_of(model), *(s["momentum_buffer"].clone() for s in optimizer.state.values())]
    calls = []

    def overflowing(model, batch):
        calls.append(None)
        return loss_of(model, batch) * (float("inf") if len(calls) == 2 else 1.0)

    step.loss_fn = overflowing
    step(batches(1)[0])
    assert_same([*weights_of(model), *(s["momentum_buffer"] for s in optimizer.state.values())], before)
    assert not optimizer.is_step_begun


def test_what_loss_fn_returns_is_handed_back():
    model = make_net()

    def loss_and_logits(model, batch):
        logits = model(batch[0])
        return nn.functional.cross_entropy(logits, batch[1]), logits, "note"

    batch = batches(1)[0]
    wanted = loss_and_logits(model, batch)
    loss, logits, note = TrainStep(model, METHODS["SAM"](model), loss_and_logits)(batch)
    assert torch.equal(loss, wanted[0]) and torch.equal(logits, wanted[1]) and note == "note"
    assert not logits.requires_grad
    model = make_net()
    loss, others = TrainStep(model, METHODS["SAM"](model), loss_and_logits, micro_batches=3)(batch)
    torch.testing.assert_close(loss, wanted[0].detach())
    torch.testing.assert_close(torch.cat([logits for logits, _ in others]), wanted[1].detach())


@pytest.mark.parametrize("drawn", ["share", "loader"])
def test_where_validation_batches_come_from(drawn):
    results = []
    for by_hand in (True, False):
        model = make_net()
        optimizer = METHODS["AgnosticSAM"](model)
        train = batches(5, size=12)
        if drawn == "share":
            pairs = [((x[:9], y[:9]), (x[9:], y[9:])) for x, y in train]
            step = TrainStep(model, optimizer, loss_of, validation=0.25)
        else:
            loader = batches(2, size=4)
            pairs = [(batch, loader[i % 2]) for i, batch in enumerate(train)]
            step = TrainStep(model, optimizer, loss_of, validation=loader)
        if by_hand:
            drive_by_hand(model, optimizer, *zip(*pairs, strict=True))
        else:
            for batch in train:
                step(batch)
        results.append(weights_of(model))
    assert_same(*results)


def test_an_outer_autocast_does_not_keep_old_weights():
    """torch caches the weights' 16-bit copies until the outermost autocast ends; a perturbed pass must not see them."""
    results = []
    for outer in (False, True):
        model = make_net(torch.float32)
        step = TrainStep(model, METHODS["SAM"](model), loss_of, autocast=torch.bfloat16)
        for batch in batches(4, torch.float32):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
                step(batch)
        results.append(weights_of(model))
    assert_same(*results)


@pytest.mark.parametrize("method", METHODS)
def test_cached_parametrizations_around_a_step_do_not_keep_old_weights(method):
    results = []
    for cached in (False, True):
        model = make_net()
        nn.utils.parametrizations.weight_norm(model.layers[0])
        step = TrainStep(model, METHODS[method](model), loss_of)
        for batch in batches(4):
            with nn.utils.parametrize.cached() if cached else nullcontext():
                step(batch, batch)
        results.append(weights_of(model))
    assert_same(*results)


def test_the_first_step_after_a_checkpoint():
    """SAMPa needs the batch of the step before; its y-gradient is part of the state."""
    train = batches(4)
    model = make_net()
    optimizer = METHODS["SAMPa"](model)
    step = TrainStep(model, optimizer, loss_of)
    for batch in train[:2]:
        step(batch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for batch in train[2:]:
        step(batch)
    wanted = weights_of(model)

    model = make_net()
    optimizer = METHODS["SAMPa"](model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    step = TrainStep(model, optimizer, loss_of)
    with pytest.raises(StepOrderError, match="previous_batch"):
        step(train[2])
    step(train[2], previous_batch=train[1])
    step(train[3])
    assert_same(weights_of(model), wanted)


def test_errors():
    model = make_net()
    sam = METHODS["SAM"](model)
    for settings, message in [
        ({"micro_batches": 0}, "micro_batches"),
        ({"perturbation": "sample"}, "perturbation"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"validation": 1.5}, "validation"),
        ({"micro_batches": 2.0}, "Invalid micro_batches: 2.0"),
        ({"micro_batches": True}, "Invalid micro_batches: True"),
        ({"micro_batches": "2"}, "Invalid micro_batches: '2'"),
        ({"micro_batches": torch.tensor(2)}, "Invalid micro_batches"),
        ({"max_grad_norm": float("nan")}, "Invalid max_grad_norm: nan"),
        ({"max_grad_norm": True}, "Invalid max_grad_norm: True"),
        ({"max_grad_norm": torch.tensor(1.0)}, "Invalid max_grad_norm"),
        ({"autocast": "bfloat16"}, "Invalid autocast: 'bfloat16'; it must be torch.bfloat16"),
        ({"autocast": True}, "Invalid autocast: True"),
        ({"autocast": torch.float32}, "Invalid autocast"),
        ({"scaler": True}, "Invalid scaler: True"),
        ({"validation": True}, "Invalid validation: True"),
        ({"validation": batches(1)[0][0]}, "Invalid validation: Tensor"),
        ({"validation": {"x": 1}}, "Invalid validation: dict"),
        ({"validation": object()}, "Invalid validation: object"),
        ({"split": 2}, "Invalid split: 2"),
        ({"weight": 2}, "Invalid weight: 2"),
        ({"memory_loss": "loss"}, "Invalid memory_loss: 'loss'"),
        ({"statistics": None}, "Invalid statistics: None"),
        ({"other_modules": model}, "Invalid other_modules: Net"),
        ({"other_modules": None}, "Invalid other_modules: NoneType"),
        ({"other_modules": [None]}, "Invalid other_modules: NoneType"),
    ]:
        with pytest.raises(InvalidSettingError, match=message):
            TrainStep(model, sam, loss_of, **settings)
    with pytest.raises(InvalidSettingError, match="Invalid loss_fn"):
        TrainStep(model, sam, loss_of(model, batches(1)[0]))
    with pytest.raises(InvalidSettingError, match="Invalid model: function"):
        TrainStep(lambda x: x, sam, loss_of)
    with pytest.raises(TypeError, match="SGD"):
        TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_of)
    with pytest.raises(InvalidSettingError, match="SAMPa has no perturbation of its own"):
        TrainStep(model, METHODS["SAMPa"](model), loss_of, micro_batches=2, perturbation="micro_batch")
    with pytest.raises(InvalidSettingError, match="GradScaler"):
        TrainStep(model, METHODS["SAMPa"](model), loss_of, scaler=torch.amp.GradScaler("cpu"))
    batch = batches(1)[0]
    with pytest.raises(StepOrderError, match="needs a validation batch"):
        TrainStep(model, METHODS["AgnosticSAM"](model), loss_of)(batch)
    with pytest.raises(ValueError, match="no batches"):
        TrainStep(model, METHODS["AgnosticSAM"](model), loss_of, validation=[])(batch)
    with pytest.raises(TypeError, match="must return the loss first"):
        TrainStep(model, sam, lambda model, batch: 1.0)(batch)
    with pytest.raises(TypeError, match=r"the loss first.*shape \(12,\)"):
        TrainStep(model, sam, lambda model, batch: model(batch[0])[:, 0])(batch)
    loss_of(model, batch).backward()
    before = weights_of(model)
    sam.first_step()
    with pytest.raises(StepOrderError, match="begun elsewhere"):
        TrainStep(model, sam, loss_of)(batch)
    assert_same(weights_of(model), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused():
    scripted = torch.jit.script(make_net(batch_norm=True))
    for model in (scripted, nn.Sequential(scripted)):
        with pytest.raises(InvalidSettingError, match=r"TorchScript.*torch.compile"):
            TrainStep(model, METHODS["SAM"](model), loss_of)


def test_iterators_of_validation_batches():
    """One that ends cannot be begun again; one without an end need not."""
    model, other = make_net(), make_net()
    loader = batches(2, size=4)
    step = TrainStep(model, METHODS["AgnosticSAM"](model), loss_of, validation=iter(loader))
    endless = TrainStep(other, METHODS["AgnosticSAM"](other), loss_of, validation=itertools.cycle(loader))
    for batch in batches(2):
        step(batch)
        endless(batch)
    before = weights_of(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="validation is exhausted: a list_iterator cannot be begun again"):
            step(batch)
    assert_same(weights_of(model), before)
    endless(batch)
    step(batch, loader[0])
    assert_same(weights_of(model), weights_of(other))


# ---------------------------------------------------------------- going on


def resumed_run(model, optimizer, saved, **options):
    """A step object in the state of another process, through a file as it is loaded by default."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    step = TrainStep(model, optimizer, loss_of, **options)
    step.load_state_dict(saved["step"])
    return step


@pytest.mark.parametrize("warm_start", ["gradient", "zero"])
@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_sampa_with_dropout_goes_on_bit_for_bit(steps, options, warm_start):
    """The batch of the step before is drawn for as it was when it was first used, in another process too."""

    def make():
        model = make_net(dropout=0.5, batch_norm=True)
        return model, SAMPa(model.parameters(), torch.optim.SGD, rho=0.1, warm_start=warm_start, **SGD)

    train = batches(6)
    model, optimizer = make()
    step = TrainStep(model, optimizer, loss_of, **options)
    torch.manual_seed(7)
    for batch in train[:steps]:
        step(batch)
    saved = {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "step": step.state_dict(),
        "random": torch.get_rng_state(),
    }
    for batch in train[steps:]:
        step(batch)
    wanted = [*weights_of(model), *(b.clone() for b in model.buffers())]

    model, optimizer = make()
    torch.manual_seed(8)
    step = resumed_run(model, optimizer, saved, **options)
    with pytest.raises(StepOrderError, match="previous_batch"):
        step(train[steps])
    torch.set_rng_state(saved["random"])
    again = step.state_dict()["previous_draws"]
    assert again is None or torch.equal(again["cpu"], saved["step"]["previous_draws"]["cpu"])
    step(train[steps], previous_batch=train[steps - 1])
    for batch in train[steps + 1 :]:
        step(batch)
    assert_same([*weights_of(model), *model.buffers()], wanted)
    with pytest.raises(ValueError, match="no state of a TrainStep"):
        step.load_state_dict(optimizer.state_dict())


def test_nothing_to_go_on_with():
    """Of methods that do not use a batch again."""
    model = make_net(dropout=0.5)
    step = TrainStep(model, METHODS["SAM"](model), loss_of)
    step(batches(1)[0])
    assert step.state_dict() == {"previous_draws": None}
    step.load_state_dict(step.state_dict())


def drive(driver, model, optimizer, batch):
    """A step without whatever else a driver does."""
    if driver == "each_pass":
        for _ in optimizer.each_pass():
            loss_of(model, batch).backward()
    elif driver == "closure":
        optimizer.step(lambda: loss_of(model, batch).backward(), closure_runs="every_pass")
    else:
        TrainStep(model, optimizer, loss_of, max_grad_norm=1.0 if driver == "clipped" else None)(batch)


@pytest.mark.parametrize("driver", ["each_pass", "closure", "TrainStep", "clipped"])
@pytest.mark.parametrize("on_base", [False, True], ids=["optimizer", "base"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RAdam])
def test_schedulers_come_after_steps_that_update_nothing(driver, on_base, base):
    """SAMPa's first, and one of infinite gradients: torch would warn of the order, and the test with it."""
    for infinite in (False, True):
        model = make_net()
        if infinite:
            optimizer = _Deflecting(model.parameters(), base, rho=0.1, lr=0.1)
        else:
            optimizer = SAMPa(model.parameters(), base, rho=0.1, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer if on_base else optimizer, 1)
        before = weights_of(model)
        x, y = batches(1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drive(driver, model, optimizer, (x * float("inf") if infinite else x, y))
            scheduler.step()
        assert_same(weights_of(model), before)


# ---------------------------------------------------------------- other modules


class _Critic(nn.Module):
    """A discriminator with statistics of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(3, dtype=torch.float64), nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, x):
        return self.last(self.norm(x)).pow(2).mean()


@pytest.mark.parametrize("method", ["SAM", "AgnosticSAM"])
@pytest.mark.parametrize("lanes", [False, True], ids=["sequential", "side by side"])
def test_statistics_of_other_modules(method, lanes, monkeypatch):
    """They learn once a step, from the training batch at the weights, and an exception undoes it."""
    if lanes and method == "SAM":
        pytest.skip("has no passes to run side by side")
    monkeypatch.setattr(TrainStep, "_make_lanes", lambda self: OneLane())
    model, critic = make_net(), _Critic()
    calls = []

    def loss(model, batch):
        calls.append(None)
        logits = model(batch[0])
        value = loss_of(model, batch) + critic(logits)
        if fails and len(calls) == 2:
            raise KeyboardInterrupt
        return value

    options = {"passes": "streams"} if lanes else {}
    step = TrainStep(model, METHODS[method](model), loss, other_modules=[critic], **options)
    for batch, other in zip(batches(3), batches(3, size=5), strict=True):
        fails = False
        wanted = copy.deepcopy(critic)
        wanted(model(batch[0]))
        step(batch, other)
        assert_same([b.clone() for b in critic.buffers()], list(wanted.buffers()))
        fails = True
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            step(batch, other)
        assert_same([b.clone() for b in critic.buffers()], list(wanted.buffers()))


# ---------------------------------------------------------------- rho = 0


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("groups", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("scaled", [False, True])
def test_clipped_steps_at_rho_zero_are_the_base(base, groups, scaled):
    """Also where the groups have another order than the model, which makes another sum of the norm."""

    def make():
        torch.manual_seed(0)
        layers = [nn.Linear(7, 64), nn.Tanh(), nn.Linear(64, 200), nn.Tanh(), nn.Dropout(0.1), nn.Linear(200, 3)]
        model = nn.Sequential(*layers)
        params = list(model.parameters())
        kinds = [[p for p in params if p.dim() < 2], [p for p in params if p.dim() > 1]]
        return model, ([{"params": kind} for kind in kinds] if groups else params)

    results = []
    for plain in (True, False):
        model, params = make()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        torch.manual_seed(3)
        if plain:
            optimizer = base(params, lr=0.05)
            for batch in batches(20, torch.float32):
                loss = loss_of(model, batch)
                (scaler.scale(loss) if scaled else loss).backward()
                if scaled:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                if scaled:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                optimizer.zero_grad()
        else:
            step = TrainStep(model, SAM(params, base, rho=0.0, lr=0.05), loss_of, max_grad_norm=0.5, scaler=scaler)
            for batch in batches(20, torch.float32):
                step(batch)
        results.append(weights_of(model))
    assert_same(*results)


# ---------------------------------------------------------------- which samples


def toy_samples():
    """l1 = 1/2 w' diag(1, 4) w and l2 = 1/2 |w - (-2, -11)|^2, from (3, 1): two samples of a batch."""
    model = nn.ParameterList([nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (3.0, 1.0)])

    def losses_of(model, samples):
        w = torch.cat(list(model))
        curvature, minimum = samples
        return (0.5 * curvature * (w - minimum) ** 2).sum(1)

    samples = (
        torch.tensor([[1.0, 4.0], [1.0, 1.0]], dtype=torch.float64),
        torch.tensor([[0.0, 0.0], [-2.0, -11.0]], dtype=torch.float64),
    )
    return model, losses_of, samples


def test_each_sample_its_own_perturbation():
    """m-SAM (arXiv 2212.04343) with a shard for each of two samples."""
    model, losses_of, samples = toy_samples()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    step = TrainStep(model, optimizer, lambda m, b: losses_of(m, b).mean(), micro_batches=2, perturbation="micro_batch")
    step(samples)
    assert [w.item() for w in model] == pytest.approx([2.5753846154, 0.0969230769], abs=1e-10)


def test_the_samples_of_largest_loss():
    """K-SAM (arXiv 2210.12864): both gradients on the k samples whose loss is largest, as docs/usage.md has it."""
    model, losses_of, samples = toy_samples()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    step = TrainStep(model, optimizer, lambda m, b: losses_of(m, b).mean())
    with torch.no_grad(), frozen_batch_norm(model):
        hardest = losses_of(model, samples).topk(1).indices
    step(tuple(t[hardest] for t in samples))
    assert [w.item() for w in model] == pytest.approx([2.4807692308, -0.2461538462], abs=1e-10)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_a_loss_takes_out_of_a_batch_is_there_for_the_next_pass(micro_batches):
    """Labels that are popped, inputs that are scaled in their place, an entry of a list that is replaced."""

    def plain(model, batch):
        return nn.functional.cross_entropy(model(batch["x"] / 2) * batch["scales"][0].mean(), batch["y"])

    def taking(model, batch):
        y = batch.pop("y")
        batch["x"] = batch["x"] / 2
        batch["scales"][0] = batch["scales"][0].mean()
        batch["seen"] = True
        return nn.functional.cross_entropy(model(batch["x"]) * batch["scales"][0], y)

    results = []
    for loss_fn in (plain, taking):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = CRSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        step = TrainStep(model, optimizer, loss_fn, micro_batches=micro_batches)
        batch = {"x": torch.randn(4, 3), "y": torch.tensor([0, 1, 0, 1]), "scales": [torch.full((4,), 3.0)]}
        before = {**batch, "scales": list(batch["scales"])}
        step(batch)
        results.append(weights_of(model))
        assert all(batch[key] is before[key] for key in ("x", "y")) and batch["scales"][0] is before["scales"][0]
    assert "seen" in batch or micro_batches > 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
