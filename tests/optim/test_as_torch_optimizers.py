"""What torch asks of every optimizer of its own, asked of every method around every base.

The settings come from torch's own database of optimizers, which it ships for its tests. What is right is what torch's
optimizer does on the same input, or an identity; nothing here is a value that this package once computed.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sam_optim import (
    ASAM,
    SAM,
    WSAM,
    AgnosticSAM,
    FriendlySAM,
    InvalidSettingError,
    MomentumSAM,
    SAMPa,
    StepOrderError,
)

from .bases import Base
from .cases import assert_same, weights_of
from .methods import METHODS, Method

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="torch's tests need expecttest")
torch.backends.__allow_nonbracketed_mutation_flag = True  # which importing torch's tests has taken from everybody

# LBFGS is refused as a base, and SparseAdam takes sparse gradients alone.
INFOS = [info for info in common.optim_db if info.optim_cls not in (torch.optim.LBFGS, torch.optim.SparseAdam)]
SGD = Base(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
ADAM = Base(torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1})
ADAGRAD = Base(torch.optim.Adagrad, {"lr": 0.05})
SOME_CLASSES = (SAM, WSAM, FriendlySAM, SAMPa, MomentumSAM)

# With every base a few methods that differ in what they ask of one, with a few bases every method.
SOME_METHODS = list({method.cls: method for method in METHODS if method.cls in SOME_CLASSES}.values())

by_method = pytest.mark.parametrize("method", METHODS, ids=str)
by_some_methods = pytest.mark.parametrize("method", SOME_METHODS, ids=str)
by_info = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
by_base = pytest.mark.parametrize("base", [SGD, ADAM, ADAGRAD], ids=str)


class Problem(nn.Module):
    """A loss of two matrices, because some optimizers take nothing else."""

    def __init__(self, dtype: torch.dtype = torch.float64, strided: bool = False, groups: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.weight = nn.Parameter(draw(6, 5, 2)[..., 0] if strided else draw(6, 5))
        self.bias = nn.Parameter(draw(6, 1, 2)[..., 0] if strided else draw(6, 1))
        self.input = draw(5, 4)

    def forward(self) -> Tensor:
        return (self.weight @ self.input + self.bias).tanh().square().sum()


def settings_of(info: Any, at_most: int = 99, **more: Any) -> list[dict[str, Any]]:
    """Of torch's database, what runs on a CPU: those with most in them where not all are wanted."""
    inputs = sorted(info.optim_inputs_func(device="cpu"), key=lambda entry: -len(entry.kwargs))[:at_most]
    return [{**copy.deepcopy(entry.kwargs), **more} for entry in inputs]


def make(method: Method, problem: nn.Module, cls: type, settings: dict[str, Any]) -> Any:
    """The method around a base; None for the pairs that are refused by design, and for a reason."""
    if cls is torch.optim.Adadelta:
        settings = {key: value for key, value in settings.items() if key != "rho"}
        with pytest.raises(InvalidSettingError, match="keeps rho in its groups"):
            method.make(problem, Base(cls, settings))
        return None
    momentum = settings.get("momentum", 0.0) if cls is torch.optim.SGD else "betas" in _defaults_of(cls)
    if method.cls is MomentumSAM and not momentum:
        if cls is not torch.optim.SGD and "momentum" in _defaults_of(cls):
            return None  # RMSprop and Muon have a momentum, which may be zero
        with pytest.raises(InvalidSettingError, match="momentum"):
            method.make(problem, Base(cls, settings))
        return None
    return method.make(problem, Base(cls, settings), closure_runs="every_pass")


def _defaults_of(cls: type) -> dict[str, Any]:
    return cls([nn.Parameter(torch.zeros(1, 1))], **({"lr": 0.1})).defaults


def step(optimizer: Any, loss_of: Callable[[], Tensor], sign: float = 1.0) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sign * loss_of()
        loss.backward()
        return loss

    if type(optimizer).__module__.startswith("torch."):
        return optimizer.step(closure)
    return optimizer.step(closure, closure, memory_closure=closure)


def train(optimizer: Any, loss_of: Callable[[], Tensor], steps: int = 4) -> None:
    for _ in range(steps):
        step(optimizer, loss_of)


@by_info
@by_some_methods
def test_it_goes_down_and_with_maximize_up(method: Method, info: Any) -> None:
    if method.settings.get("decouple"):
        return  # adds a term whose length is the learning rate's, whatever the base makes of that
    for number, settings in enumerate(settings_of(info, 3)):
        problem = Problem(strided=number == 0)
        optimizer = make(method, problem, info.optim_cls, settings)
        if optimizer is None:
            return
        before = problem().item()
        train(optimizer, problem, 10)
        after = problem().item()
        assert (after > before) if settings.get("maximize") else (after < before), settings


@by_info
@by_some_methods
def test_maximizing_is_minimizing_the_negative(method: Method, info: Any) -> None:
    if info.optim_cls is torch.optim.Muon:
        return  # has no maximize
    for settings in settings_of(info, 1, maximize=False):
        down, up = Problem(), Problem()
        minimizes = make(method, down, info.optim_cls, settings)
        if minimizes is None:
            continue
        maximizes = make(method, up, info.optim_cls, {**settings, "maximize": True})
        for _ in range(4):
            step(minimizes, down)
            step(maximizes, up, -1.0)
        torch.testing.assert_close(weights_of(up), weights_of(down), rtol=1e-12, atol=1e-12)


@by_info
def test_rho_zero_is_torchs_own_with_every_implementation(info: Any) -> None:
    # One that is differentiable wants parameters that are no leaves.
    inputs = common._get_optim_inputs_including_global_cliquey_kwargs("cpu", None, info, skip=("differentiable",))
    for entry in inputs:
        ours, theirs = Problem(), Problem()
        optimizer = make(Method(SAM, {"rho": 0.0}), ours, info.optim_cls, copy.deepcopy(entry.kwargs))
        if optimizer is None:
            continue
        base = info.optim_cls(theirs.parameters(), **copy.deepcopy(entry.kwargs))
        for _ in range(4):
            assert step(optimizer, ours).item() == step(base, theirs).item()
        assert_same(weights_of(ours), weights_of(theirs))


@by_info
@by_some_methods
def test_complex_numbers_are_pairs_of_real_ones(method: Method, info: Any) -> None:
    if not info.supports_complex:
        return

    class Complex(nn.Module):
        def __init__(self, is_complex: bool) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(4)
            self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128, generator=generator))
            self.bias = nn.Parameter(torch.randn(4, 1, dtype=torch.complex128, generator=generator))
            self.input = torch.randn(3, 5, dtype=torch.complex128, generator=generator)
            if not is_complex:
                self.weight = nn.Parameter(torch.view_as_real(self.weight.detach()).clone())
                self.bias = nn.Parameter(torch.view_as_real(self.bias.detach()).clone())

        def forward(self) -> Tensor:
            weight, bias = (p if p.is_complex() else torch.view_as_complex(p) for p in (self.weight, self.bias))
            return (weight @ self.input + bias).abs().square().mean()

    for settings in settings_of(info, 1):
        one, two = Complex(True), Complex(False)
        optimizers = [make(method, problem, info.optim_cls, settings) for problem in (one, two)]
        if optimizers[0] is None:
            continue
        for _ in range(4):
            for optimizer, problem in zip(optimizers, (one, two), strict=True):
                step(optimizer, problem)
        as_pairs = [torch.view_as_real(w) for w in weights_of(one)]
        torch.testing.assert_close(as_pairs, weights_of(two), rtol=1e-9, atol=1e-12)


@by_info
@by_some_methods
def test_a_learning_rate_may_be_a_tensor(method: Method, info: Any) -> None:
    for lr in (torch.tensor(0.01), torch.tensor([0.01])):
        one, two = Problem(), Problem()
        try:
            info.optim_cls(one.parameters(), lr=lr)
        except ValueError:
            return  # torch's own does not take one
        optimizers = [
            make(method, one, info.optim_cls, {"lr": lr.item()}),
            make(method, two, info.optim_cls, {"lr": lr.clone()}),
        ]
        if optimizers[0] is None:
            return
        train(optimizers[0], one)
        train(optimizers[1], two)
        torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-6, atol=1e-9)
        assert isinstance(optimizers[1].param_groups[0]["lr"], Tensor)


@by_info
def test_groups_differ_as_torchs_do(info: Any) -> None:
    def groups(problem: Problem) -> list[dict[str, Any]]:
        return [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.001, "weight_decay": 0.5}]

    if info.optim_cls in (torch.optim.Adadelta, torch.optim.Rprop):
        return  # refused; without weight decay
    ours, theirs, other = Problem(), Problem(), Problem()
    optimizer = SAM(groups(ours), info.optim_cls, rho=0.0, lr=0.01, closure_runs="every_pass")
    base = info.optim_cls(groups(theirs), lr=0.01)
    train(optimizer, ours)
    train(base, theirs)
    assert_same(weights_of(ours), weights_of(theirs))

    # And perturbed: two plain passes and torch's own step, by hand.
    optimizer = SAM(groups(problem := Problem()), info.optim_cls, rho=0.1, lr=0.01)
    base = info.optim_cls(groups(other), lr=0.01)
    for _ in range(4):
        for _ in optimizer.each_pass():
            problem().backward()
        gradients = torch.autograd.grad(other(), list(other.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        before = weights_of(other)
        with torch.no_grad():
            for p, g in zip(other.parameters(), gradients, strict=True):
                p += 0.1 * g / norm
        base.zero_grad()
        other().backward()
        with torch.no_grad():
            for p, w in zip(other.parameters(), before, strict=True):
                p.copy_(w)
        base.step()
    torch.testing.assert_close(weights_of(problem), weights_of(other), rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- state


def resumed(method: Method, info: Any, settings: dict[str, Any], change: Callable[[Any], Any]) -> None:
    """Trains, saves, changes what was saved, loads it into another optimizer, and trains both on: the same bits."""
    one = Problem()
    first = make(method, one, info.optim_cls, settings)
    if first is None:
        return
    train(first, one, 3)
    two = copy.deepcopy(one)
    second = make(method, two, info.optim_cls, settings)
    saved = first.state_dict()
    kept = copy.deepcopy(saved)
    second.load_state_dict(change(saved))
    assert_equal(saved, kept)
    if method.cls.uses_previous_batch:  # a closure is no state
        for optimizer, problem in ((first, one), (second, two)):
            closure = closure_of(optimizer, problem)
            optimizer.step(closure, previous_closure=closure)
    else:
        step(first, one)
        step(second, two)
    train(first, one, 2)
    train(second, two, 2)
    if goes_on_to_the_bit(info, settings, change):
        assert_same(weights_of(one), weights_of(two))
    else:
        torch.testing.assert_close(weights_of(one), weights_of(two), rtol=1e-5, atol=1e-6)


def goes_on_to_the_bit(info: Any, settings: dict[str, Any], change: Callable[[Any], Any]) -> bool:
    """Whether torch's own optimizer does: some keep numbers in another type than they load them in."""
    one = Problem()
    first = info.optim_cls(one.parameters(), **copy.deepcopy(settings))
    train(first, one, 3)
    two = copy.deepcopy(one)
    second = info.optim_cls(two.parameters(), **copy.deepcopy(settings))
    second.load_state_dict(change(first.state_dict()))
    train(first, one, 2)
    train(second, two, 2)
    return all(torch.equal(a, b) for a, b in zip(weights_of(one), weights_of(two), strict=True))


def closure_of(optimizer: Any, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


def assert_equal(one: Any, two: Any) -> None:
    """Nested containers of tensors and other values."""
    if isinstance(one, Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    else:
        assert one == two


def through_a_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def as_of_an_older_torch(state_dict: Any) -> Any:
    """Without the flags that came later, and with step counts that are numbers."""
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        for flag in ("foreach", "fused", "maximize", "differentiable", "capturable", "decoupled_weight_decay"):
            if group.get(flag) in (None, False):
                group.pop(flag, None)
    for entries in state_dict["state"].values():
        if isinstance(entries.get("step"), Tensor):
            entries["step"] = entries["step"].item()
    return state_dict


def without_names(state_dict: Any) -> Any:
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group.pop("param_names", None)
    return state_dict


@by_info
@by_some_methods
def test_a_state_dict_goes_on_to_the_bit(method: Method, info: Any) -> None:
    resumed(method, info, settings_of(info)[0], copy.deepcopy)


@by_info
def test_a_state_dict_of_an_older_torch_goes_on(info: Any) -> None:
    if info.optim_cls is torch.optim.Adafactor:
        return  # torch's own does not
    for settings in settings_of(info):
        resumed(Method(SAM, {"rho": 0.1}), info, settings, as_of_an_older_torch)


@pytest.mark.parametrize("change", [through_a_file, as_of_an_older_torch, without_names], ids=lambda c: c.__name__)
@by_base
@by_method
def test_a_changed_state_dict_goes_on_to_the_bit(method: Method, base: Base, change: Callable[[Any], Any]) -> None:
    info = next(info for info in INFOS if info.optim_cls is base.cls)
    if change is without_names and method.settings.get("adaptive") == "weights":
        return  # which chooses parameters by their names
    resumed(method, info, base.settings, change)


@by_info
def test_state_moves_to_and_from_torchs_own(info: Any) -> None:
    for settings in settings_of(info):
        ours, theirs = Problem(), Problem()
        optimizer = make(Method(SAM, {"rho": 0.0}), ours, info.optim_cls, settings)
        if optimizer is None:
            return
        base = info.optim_cls(theirs.named_parameters(), **copy.deepcopy(settings))
        train(optimizer, ours, 3)
        train(base, theirs, 3)
        saved, saved_by_base = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(base.state_dict())
        assert_equal(saved["state"], saved_by_base["state"])
        optimizer.load_state_dict(saved_by_base)
        base.load_state_dict(saved)
        train(optimizer, ours, 3)
        train(base, theirs, 3)
        assert_same(weights_of(ours), weights_of(theirs))


@by_base
@by_method
def test_state_is_loaded_into_another_type(method: Method, base: Base) -> None:
    one = Problem(torch.float64)
    first = make(method, one, base.cls, base.settings)
    if first is None:
        return
    train(first, one, 3)
    two = copy.deepcopy(one).float()
    two.input = two.input.float()
    second = make(method, two, base.cls, base.settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for key, value in ((k, v) for entries in second.state.values() for k, v in entries.items()):
        assert key == "step" or not isinstance(value, Tensor) or value.dtype == torch.float32
    for optimizer, problem in ((first, one), (second, two)):
        closure = closure_of(optimizer, problem)
        optimizer.step(closure, closure, closure, memory_closure=closure)
    torch.testing.assert_close(weights_of(two), [w.float() for w in weights_of(one)], rtol=1e-4, atol=1e-5)


@by_base
@by_method
def test_copies_and_pickles_go_on_to_the_bit(method: Method, base: Base) -> None:
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        problem = Problem()
        optimizer = make(method, problem, base.cls, base.settings)
        if optimizer is None:
            return
        train(optimizer, problem, 3)
        other, second = copied((problem, optimizer))
        assert [p for g in second.param_groups for p in g["params"]] == list(other.parameters())
        public = {key for key in vars(optimizer) if not key.startswith("_")}
        assert public == {key for key in vars(second) if not key.startswith("_")}
        for own, loss_of in ((optimizer, problem), (second, other)):
            closure = closure_of(own, loss_of)
            own.step(closure, closure, closure, memory_closure=closure)
        train(optimizer, problem, 2)
        train(second, other, 2)
        assert_same(weights_of(problem), weights_of(other))
        assert base.cls.__name__ in repr(optimizer.base_optimizer)
        assert method.cls.__name__ in repr(second)


# ---------------------------------------------------------------------------------------------------- hooks


def hook_everything(optimizer: Any, called: list[str]) -> None:
    """Registers each kind of hook, some of them to be called first."""
    optimizer.register_step_pre_hook(lambda *_: called.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda _: called.append("save pre"))
    optimizer.register_state_dict_pre_hook(lambda _: called.append("save pre, first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda _, saved: called.append("save post") or {**saved, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: called.append("load pre") or dict(saved))
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("load post"))
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("load post, first"), prepend=True)


@by_base
@by_method
def test_hooks_are_called_as_torchs_are(method: Method, base: Base) -> None:
    called: dict[str, list[str]] = {"ours": [], "torch's": []}
    for name, own in called.items():
        problem = Problem()
        if name == "ours":
            optimizer = make(method, problem, base.cls, base.settings)
            if optimizer is None:
                return
            if method.cls.uses_previous_batch:
                step(optimizer, problem)  # which updates nothing
        else:
            optimizer = base.cls(problem.parameters(), **copy.deepcopy(base.settings))
        handles = [
            register_optimizer_step_pre_hook(lambda *_, own=own: own.append("global pre")),
            register_optimizer_step_post_hook(lambda *_, own=own: own.append("global post")),
        ]
        try:
            hook_everything(optimizer, own)
            train(optimizer, problem, 2)
        finally:
            for handle in handles:
                handle.remove()
        saved = optimizer.state_dict()
        assert saved.pop("more") == 1
        optimizer.load_state_dict(saved)
    assert called["ours"] == called["torch's"]


# ---------------------------------------------------------------------------------------------------- gradients


@by_base
@by_method
def test_nothing_to_train_is_no_step(method: Method, base: Base) -> None:
    """Where every parameter is frozen nobody can have forgotten a backward pass."""
    problem = Problem().requires_grad_(False)
    optimizer = make(method, problem, base.cls, base.settings)
    if optimizer is None:
        return
    before = weights_of(problem)
    for _ in range(2):
        optimizer.step(problem, problem, problem, memory_closure=problem)
    assert_same(weights_of(problem), before)
    assert not optimizer.is_step_begun


@by_base
@by_method
def test_a_forgotten_backward_pass_is_an_error(method: Method, base: Base) -> None:
    problem = Problem()
    optimizer = make(method, problem, base.cls, base.settings)
    if optimizer is None:
        return
    before = weights_of(problem)
    with pytest.raises(StepOrderError, match="backward"):
        for _ in range(2):  # the first step of SAMPa takes no second gradient
            optimizer.step(problem, problem, problem, memory_closure=problem)
    assert_same(weights_of(problem), before)


@by_info
@by_some_methods
def test_gradients_of_zero_are_torchs_step_with_them(method: Method, info: Any) -> None:
    for settings in settings_of(info, 1):
        ours, theirs = Problem(), Problem()
        optimizer = make(method, ours, info.optim_cls, settings)
        if optimizer is None:
            continue
        base = info.optim_cls(theirs.parameters(), **copy.deepcopy(settings))
        for _ in range(3):
            step(optimizer, lambda problem=ours: 0.0 * problem())
        for _ in range(2 if method.cls.uses_previous_batch else 3):
            step(base, lambda problem=theirs: 0.0 * problem())
        torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=1e-12, atol=1e-12)


@by_base
@by_method
def test_parameters_without_a_gradient_stay(method: Method, base: Base) -> None:
    problem = Problem()
    optimizer = make(method, problem, base.cls, base.settings)
    if optimizer is None:
        return
    bias, weight = problem.bias.detach().clone(), problem.weight.detach().clone()
    train(optimizer, lambda: (problem.weight @ problem.input).square().sum(), 3)
    assert torch.equal(problem.bias, bias)
    assert not torch.equal(problem.weight, weight)


# ---------------------------------------------------------------------------------------------------- the rest


@by_info
def test_bad_arguments_are_told_as_torch_tells_them(info: Any) -> None:
    if info.optim_cls is torch.optim.Adadelta or info.optim_error_inputs_func is None:
        return
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float64):
        if case.error_on is not common.OptimizerErrorEnum.CONSTRUCTION_ERROR:
            continue
        given = case.optimizer_error_input
        params = [nn.Parameter(torch.zeros(1, 1))] if given.params is None else given.params
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(case.error_type, match=case.error_regex):
                SAM(params, info.optim_cls, rho=0.1, **given.kwargs)


@by_info
def test_schedulers_change_what_they_change_of_torchs_own(info: Any) -> None:
    if info.optim_cls is torch.optim.Adadelta:
        return
    for makers in info.scheduler_inputs:
        ours, theirs = Problem(), Problem()
        optimizer = SAM(ours.parameters(), info.optim_cls, rho=0.1, lr=0.01, closure_runs="every_pass")
        base = info.optim_cls(theirs.parameters(), lr=0.01)
        pairs = [(maker(optimizer), maker(base)) for maker in makers]
        for _ in range(12):
            step(optimizer, ours)
            step(base, theirs)
            for pair in pairs:
                for scheduler in pair:
                    scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
            assert optimizer.param_groups[0]["lr"] == base.param_groups[0]["lr"]
        for own, of_base in pairs:
            assert_equal(
                {k: v for k, v in own.state_dict().items() if not callable(v)},
                {k: v for k, v in of_base.state_dict().items() if not callable(v)},
            )


@by_base
def test_the_default_type_changes_nothing(base: Base) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            problem = Problem(torch.float32)
            optimizer = make(Method(SAM, {"rho": 0.1}), problem, base.cls, base.settings)
            train(optimizer, problem)
            results.append(weights_of(problem))
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_positional_arguments_and_generators() -> None:
    """As torch's: parameters in any iterable, named or not, in groups or not."""
    losses = set()
    for params in (
        lambda p: list(p.parameters()),
        lambda p: p.parameters(),
        lambda p: p.named_parameters(),
        lambda p: [{"params": p.parameters()}],
        lambda p: [{"params": p.weight}, {"params": [p.bias]}],
        lambda p: ({"params": [("weight", p.weight), ("bias", p.bias)]} for _ in range(1)),
    ):
        problem = Problem()
        optimizer = SAM(params(problem), torch.optim.SGD, 0.1, lr=0.1, closure_runs="every_pass")
        train(optimizer, problem)
        losses.add(problem().item())
    assert len(losses) == 1


@pytest.mark.parametrize("cls", [SAM, ASAM, AgnosticSAM], ids=lambda cls: cls.__name__)
def test_no_parameters_is_torchs_error(cls: type) -> None:
    message = re.escape("optimizer got an empty parameter list")
    with pytest.raises(ValueError, match=message):
        torch.optim.SGD([], lr=0.1)
    with pytest.raises(ValueError, match=message):
        cls([], torch.optim.SGD, lr=0.1)
