"""State dicts: by torch.distributed.checkpoint, of older layouts, of other SAM classes, and copies of optimizers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import sam_optim
from sam_optim import (
    SAM,
    LookSAM,
    SAMPa,
    StepOrderError,
)

from .bases import ADAMW, AMSGRAD, KINDS, PLAIN_SGD, SGD, SGD_OF_A_TENSOR, UNFUSED
from .cases import assert_same, batches, loss_of, make_net, step_by_hand, weights_of
from .drivers import by_train_step, data_of_steps
from .methods import METHODS, methods_with, named

# dcp says so where it saves or loads without ranks.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

OPTIONS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
WITH_AVERAGE = named("FriendlySAM")
STATEFUL = methods_with(keeps_state=True)


def train(optimizer, model, steps=3, previous=None):
    """Steps of any method; they depend on the optimizer's state, the weights and nothing else."""
    data = data_of_steps(steps, next(model.parameters()).dtype)
    by_train_step(optimizer, model, [{**data[0], "previous": previous}, *data[1:]] if steps else [])


def resumed(make, save, load, steps=3):
    """Weights after a run that goes on, and after one that is resumed in another optimizer between."""
    model, optimizer = make()
    train(optimizer, model, steps)
    optimizer.zero_grad()
    saved = save(model, optimizer)
    weights = copy.deepcopy(model.state_dict())
    last = batches(steps, next(model.parameters()).dtype)[-1] if isinstance(optimizer, SAMPa) and steps else None
    train(optimizer, model, previous=last)

    other, again = make()
    other.load_state_dict(weights)
    load(other, again, saved)
    train(again, other, previous=last)
    return weights_of(model), weights_of(other)


def maker(method, base, dtype=torch.float64, **more):
    def make():
        model = make_net(dtype)
        return model, method.make(model, base, **more)

    return make


def by_files(options, folder):
    """As torch.distributed.checkpoint is meant: what it loads it writes into a state dict of the new optimizer."""

    def save(model, optimizer):
        dcp.save(get_optimizer_state_dict(model, optimizer, options=options), checkpoint_id=folder, no_dist=True)

    def load(model, optimizer, saved):
        state_dict = get_optimizer_state_dict(model, optimizer, options=options)
        dcp.load(state_dict, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(model, optimizer, state_dict, options=options)

    return save, load


def in_memory(options, of=lambda optimizer: optimizer):
    def save(model, optimizer):
        return copy.deepcopy(get_optimizer_state_dict(model, of(optimizer), options=options))

    def load(model, optimizer, saved):
        set_optimizer_state_dict(model, of(optimizer), saved, options=options)

    return save, load


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_distributed_checkpoint_of_every_method(method, options, tmp_path):
    assert_same(*resumed(maker(method, ADAMW), *by_files(OPTIONS[options], tmp_path)))
    assert_same(*resumed(maker(method, ADAMW), *in_memory(OPTIONS[options])))


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (PLAIN_SGD, "nested"),
        (PLAIN_SGD, "flat"),
        (SGD, "flat"),
        (SGD_OF_A_TENSOR, "full"),
        (AMSGRAD, "nested"),
        (UNFUSED, "full"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", STATEFUL, ids=str)
def test_distributed_checkpoint_of_every_kind_of_base(method, base, options, tmp_path):
    assert_same(*resumed(maker(method, base), *by_files(OPTIONS[options], tmp_path)))


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("method", [*STATEFUL, named("SAM")], ids=str)
def test_distributed_checkpoint_before_there_is_state(method, steps, tmp_path):
    """SAMPa has no state of the base after its first step, the others have none before it."""
    assert_same(*resumed(maker(method, ADAMW), *by_files(OPTIONS["nested"], tmp_path), steps=steps))


@pytest.mark.parametrize("options", ["nested", "flat"])
@pytest.mark.parametrize("base", [PLAIN_SGD, SGD, ADAMW], ids=str)
@pytest.mark.parametrize("method", [named("SAM"), WITH_AVERAGE], ids=str)
def test_distributed_checkpoint_of_masters(method, base, options, tmp_path):
    make = maker(method, base, torch.bfloat16, master_weights=True)
    assert_same(*resumed(make, *by_files(OPTIONS[options], tmp_path)))


@pytest.mark.parametrize("method", [*STATEFUL, named("SAM")], ids=str)
def test_the_base_alone_is_enough(method):
    """As these docs once said: its state dict has everything."""
    save, load = in_memory(OPTIONS["nested"], lambda optimizer: optimizer.base_optimizer)
    assert_same(*resumed(maker(method, ADAMW), save, load))
    if method.cls is not LookSAM:
        assert_same(*resumed(maker(method, ADAMW, torch.bfloat16, master_weights=True), save, load))


def test_making_state_changes_nothing():
    """torch makes state by a step with zeros as gradients and lr 0. Adam's step count stays where it was, too."""
    for method in METHODS:
        found = []
        for asks in (False, True):
            model, optimizer = maker(method, ADAMW)()
            before = weights_of(model)
            if asks:
                get_optimizer_state_dict(model, optimizer)
                assert all(p.grad is None for p in model.parameters())
                assert optimizer.param_groups[0]["lr"] == 0.01
            assert_same(weights_of(model), before)
            train(optimizer, model)
            found.append(weights_of(model))
        assert_same(*found)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_step_without_a_pass_is_still_refused(lr):
    model = make_net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=lr, momentum=0.9)
    with pytest.raises(StepOrderError, match="none is begun"):
        optimizer.step()  # no gradient
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(StepOrderError, match="none is begun"):
        optimizer.step()  # a warm-up's first step, without first_step()
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    assert all(optimizer.state[p]["momentum_buffer"].eq(0.0).all() for p in model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    with pytest.raises(StepOrderError, match="none is begun"):
        optimizer.step()


@pytest.mark.parametrize(
    ("method", "base"),
    [
        *((method, ADAMW) for method in METHODS),
        *((method, base) for method in STATEFUL for base in (PLAIN_SGD, SGD, UNFUSED)),
    ],
    ids=str,
)
def test_files_load_as_weights_only_and_into_the_plain_base(method, base):

    def save(model, optimizer):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        return file

    def load(model, optimizer, file):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        optimizer.load_state_dict(saved)
        foreign = [k for entries in optimizer.base_optimizer.state.values() for k in entries if "sam_optim" in k]
        assert not foreign
        other = copy.deepcopy(model)
        plain = base.cls(other.parameters(), **copy.deepcopy(base.settings))
        plain.load_state_dict(copy.deepcopy(saved))  # torch takes tensors as they are
        loss_of(other, batches(1)[0]).backward()
        plain.step()
        back = copy.deepcopy(plain.state_dict())
        method.make(model, base).load_state_dict(back)

    for steps in (1, 3):
        assert_same(*resumed(maker(method, base), save, load, steps))


@pytest.mark.parametrize(
    ("method", "more"), [*((method, {}) for method in STATEFUL), (WITH_AVERAGE, {"master_weights": True})], ids=str
)
def test_the_layout_of_before(method, more):
    """Lists by position beside the base's state."""

    def save(model, optimizer):
        saved = copy.deepcopy(optimizer.state_dict())
        lists: dict[str, list[Any]] = {}
        for index, _ in enumerate(model.parameters()):
            entries = saved["state"][index]
            for name in [name for name in entries if name.startswith("sam_optim_")]:
                lists.setdefault(name.removeprefix("sam_optim_"), []).append(entries.pop(name))
        assert all(len(entries) == 4 for entries in lists.values()) and len(lists) == 1 + len(more)
        return {**saved, "method_state": lists}

    def load(model, optimizer, saved):
        optimizer.load_state_dict(saved)

    assert_same(*resumed(maker(method, ADAMW, torch.bfloat16 if more else torch.float64, **more), save, load))


def spoilt(saved, how):
    saved = copy.deepcopy(saved)
    if how == "groups":
        saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))
    elif how == "parameters":
        saved["param_groups"][0]["params"].append(4)
    elif how == "shape":
        saved["state"][2]["sam_optim_average"] = torch.zeros(2, 2)
    else:
        saved["method_state"] = {"average": [None] * 3}
    return saved


@pytest.mark.parametrize("how", ["groups", "parameters", "shape", "list"])
def test_all_or_nothing(how):
    """What cannot be loaded changes nothing: the run goes on as if nobody had tried."""
    found = []
    for tries in (False, True):
        model, optimizer = maker(WITH_AVERAGE, ADAMW, torch.bfloat16, master_weights=True)()
        train(optimizer, model)
        if tries:
            with pytest.raises(ValueError, match=r"different number|doesn't match the size|average"):
                optimizer.load_state_dict(spoilt(optimizer.state_dict(), how))
        train(optimizer, model)
        found.append(weights_of(model))
    assert_same(*found)


# ---------------------------------------------------------------- of other SAM classes


class Common(torch.optim.Optimizer):
    """SAM as most write it: state_dict() is of the wrapper, whose state holds copies of the weights."""

    def __init__(self, params, base_optimizer, rho, **kwargs):
        super().__init__(params, {"rho": rho, "adaptive": False, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old_p"] = p.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()
        self.zero_grad()


@pytest.mark.parametrize("base", KINDS, ids=str)
def test_copies_of_weights_are_left_out(base):
    """Weights and settings go on, the base's state was never in that checkpoint: a fresh optimizer with lr and rho."""
    model = make_net()
    common = Common(model.parameters(), base.cls, rho=0.2, **base.settings)
    for batch in batches(2):
        step_by_hand(common, model, batch)
    saved = common.state_dict()
    other, wanted = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = SAM(other.parameters(), base.cls, rho=0.05, **base.settings)
    with pytest.warns(UserWarning, match=r"another SAM class.*old_p.*nothing of its base optimizer's state"):
        optimizer.load_state_dict(saved)
    fresh = SAM(wanted.parameters(), base.cls, rho=0.2, **base.settings)
    for batch in batches(3):
        step_by_hand(optimizer, other, batch)
        step_by_hand(fresh, wanted, batch)
    assert_same(weights_of(other), weights_of(wanted))
    assert not any("old_p" in entries for entries in optimizer.state_dict()["state"].values())


def test_copies_beside_the_bases_state():
    """Classes that share the base's state leave copies in it, if they are saved between their two steps."""
    model, optimizer = maker(named("SAM"), ADAMW)()
    train(optimizer, model)
    saved = copy.deepcopy(optimizer.state_dict())
    for entries in saved["state"].values():
        entries["old_p"] = torch.zeros(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    assert all(set(entries) == {"step", "exp_avg", "exp_avg_sq"} for entries in optimizer.state.values())


def of_pytorch_optimizer(theirs, name, model, base):
    """Their optimizer, and a function that makes a step of it."""
    settings = copy.deepcopy(base.settings)
    if name == "GSAM":
        inner = base.cls(model.parameters(), **settings)
        schedule = torch.optim.lr_scheduler.ConstantLR(inner, 1.0)
        radii = theirs.ProportionScheduler(schedule, max_lr=1.0, min_lr=0.0, max_value=0.1, min_value=0.1)
        other = theirs.GSAM(model.parameters(), inner, model, rho_scheduler=radii)

        def step(batch):
            other.set_closure(nn.functional.cross_entropy, *batch)
            other.step()

        return other, step
    given = (model, model.parameters()) if name == "WSAM" else (model.parameters(),)
    other = getattr(theirs, name)(*given, base.cls, rho=0.1, **settings)

    def step(batch):
        def closure():
            other.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        closure()
        other.step(closure)
        other.zero_grad()

    return other, step


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=str)
@pytest.mark.parametrize("name", ["SAM", "GSAM", "WSAM", "LookSAM", "FriendlySAM"])
def test_checkpoints_of_pytorch_optimizer(name, base):
    """They hold the base's state, in the wrapper's or beside it. The same steps follow where methods are the same."""
    theirs = pytest.importorskip("pytorch_optimizer")
    model = make_net()
    other, step = of_pytorch_optimizer(theirs, name, model, base)
    for batch in batches(3):
        step(batch)
    saved = copy.deepcopy(other.state_dict())
    own_model = copy.deepcopy(model)
    settings = {**copy.deepcopy(base.settings), "rho": 0.1}
    optimizer = getattr(sam_optim, name)(own_model.parameters(), base.cls, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    for p, q in zip(own_model.parameters(), model.parameters(), strict=True):
        wanted = {k: v for k, v in other.base_optimizer.state[q].items() if k != "old_g"}
        found = optimizer.base_optimizer.state[p]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(torch.as_tensor(found[k]), torch.as_tensor(wanted[k])) for k in wanted)
    if name in ("SAM", "FriendlySAM"):
        for batch in batches(3):
            step(batch)
            step_by_hand(optimizer, own_model, batch)
        torch.testing.assert_close(weights_of(own_model), weights_of(model), rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------- copies


def hooked(method):
    """After some steps, with a hook of each kind on the optimizer and its base; and the hooks' calls."""
    model, optimizer = maker(method, ADAMW)()
    train(optimizer, model)
    optimizer.zero_grad()
    calls = []
    for one in (optimizer, optimizer.base_optimizer):
        one.register_step_pre_hook(lambda *a: calls.append("pre"))
        one.register_step_post_hook(lambda *a: calls.append("post"))
        one.register_state_dict_pre_hook(lambda *a: calls.append("saving"))
        one.register_state_dict_post_hook(lambda *a: calls.append("saved"))
        one.register_load_state_dict_pre_hook(lambda *a: calls.append("loading"))
        one.register_load_state_dict_post_hook(lambda *a: calls.append("loaded"))
    return model, optimizer, calls


@pytest.mark.parametrize("by", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_copies_have_state_and_no_hooks(method, by):
    model, optimizer, calls = hooked(method)
    other, twin = by((model, optimizer))
    assert all(p is q for p, q in zip(other.parameters(), twin.param_groups[0]["params"], strict=True))
    last = batches(3)[-1] if isinstance(optimizer, SAMPa) else None
    calls.clear()
    train(twin, other, previous=last)
    twin.load_state_dict(twin.state_dict())
    assert not calls
    train(optimizer, model, previous=last)
    assert calls
    # Where hooks are to see a step's gradient, it is made before the update instead of within it.
    torch.testing.assert_close(weights_of(other), weights_of(model), rtol=1e-12, atol=1e-14)


def test_a_copy_keeps_masters():
    model, optimizer = maker(named("VaSSO"), ADAMW, torch.bfloat16, master_weights=True)()
    train(optimizer, model)
    optimizer.zero_grad()
    other, twin = copy.deepcopy((model, optimizer))
    train(optimizer, model)
    train(twin, other)
    assert_same(weights_of(other), weights_of(model))


def test_process_groups_stay_where_they_are():
    model = make_net()
    group = lambda: None  # noqa: E731  stands for one; like it, it cannot be pickled
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, process_group=group)
    with pytest.raises(TypeError, match="process group belongs to its process"):
        pickle.dumps(optimizer)
    assert copy.deepcopy(optimizer).process_group is group
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, process_group=group, counts_in_norm=lambda p: True)
    with pytest.raises(TypeError, match="make another optimizer for the copied model"):
        copy.deepcopy(optimizer)
