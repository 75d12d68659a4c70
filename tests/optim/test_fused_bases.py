"""What the kernels know of base optimizers: which classes and settings they take over, and that updates are theirs."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import sam_kernels as sk
from sam_kernels.bases import BASES, base_of
from sam_optim import SAM
from sam_optim.core.base_update import FusedState

from .cases import assert_same, batches, make_net, step_by_hand, weights_of


def unfused(cls: type) -> type:
    """The same optimizer, of a class that the kernels do not know."""
    return type("Unfused" + cls.__name__, (cls,), {})


def lion(package: str) -> type[torch.optim.Optimizer]:
    return pytest.importorskip(package).Lion


def is_fused(optimizer) -> bool:
    """Whether the kernels make its updates, with its present settings."""
    return FusedState(optimizer).settings() is not None


def one_parameter(cls, dtype=torch.float64, **settings):
    return cls([nn.Parameter(torch.ones(3, dtype=dtype))], lr=0.1, **settings)


def trained(cls, settings, steps=12, dtype=torch.float64):
    """Two groups, of which one is kept still for the first steps; the weights and the state."""
    torch.manual_seed(1)
    model = make_net(dtype)
    bodies, biases = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
    groups = [{"params": bodies}, {"params": biases, "lr": 0.003}]
    optimizer = SAM(groups, cls, rho=0.05, **{"lr": 0.01, **copy.deepcopy(settings)})
    for number, batch in enumerate(batches(steps, dtype)):
        biases[0].requires_grad_(number > 2)
        step_by_hand(optimizer, model, batch)
    return weights_of(model), optimizer


LION = [
    {},
    {"betas": (0.95, 0.98), "weight_decay": 0.1},
    {"weight_decay": 0.1, "weight_decouple": False},
    {"weight_decay": 0.1, "maximize": True},
    {"foreach": False},
    {"lr": torch.tensor(0.01, dtype=torch.float64), "weight_decay": 0.1},
]


@pytest.mark.parametrize("settings", LION, ids=str)
def test_lion_is_pytorch_optimizers_bit_for_bit(settings):
    cls = lion("pytorch_optimizer")
    (got, fused), (wanted, plain) = trained(cls, settings), trained(unfused(cls), settings)
    assert is_fused(fused.base_optimizer) and not is_fused(plain.base_optimizer)
    assert_same(got, wanted)
    # Moments may differ in a last bit: torch multiplies and adds at once where the processor can.
    for own, theirs in zip(fused.state.values(), plain.state.values(), strict=True):
        torch.testing.assert_close(own["exp_avg"], theirs["exp_avg"], rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize(
    "settings",
    [{}, {"betas": (0.95, 0.98), "weight_decay": 0.1}, {"weight_decay": 0.02, "decoupled_weight_decay": True}],
    ids=str,
)
def test_lion_is_lion_pytorchs_bit_for_bit(settings):
    cls = lion("lion_pytorch")
    (got, fused), (wanted, _) = trained(cls, settings), trained(unfused(cls), settings)
    assert is_fused(fused.base_optimizer)
    assert_same(got, wanted)


def test_lion_of_other_settings_makes_its_own_updates():
    cls = lion("pytorch_optimizer")
    for settings in ({"fixed_decay": True}, {"use_gc": True}, {"adanorm": True, "adanorm_r": 0.95}, {"cautious": True}):
        optimizer = one_parameter(cls, **settings)
        assert not is_fused(optimizer)
        (got, _), (wanted, _) = trained(cls, settings, steps=2), trained(unfused(cls), settings, steps=2)
        assert_same(got, wanted)
    # Complex gradients have a sign of their own in one of the two packages.
    assert is_fused(one_parameter(cls, torch.complex64))
    other = pytest.importorskip("lion_pytorch").Lion
    assert is_fused(one_parameter(other)) and not is_fused(one_parameter(other, torch.complex64))


RMSPROP = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "alpha": 0.9},
    {"centered": True, "eps": 1e-3},
    {"momentum": 0.5, "centered": True, "weight_decay": 0.01},
]


@pytest.mark.parametrize("settings", RMSPROP, ids=str)
def test_rmsprop_is_torchs(settings):
    (got, fused), (wanted, plain) = (
        trained(cls, settings) for cls in (torch.optim.RMSprop, unfused(torch.optim.RMSprop))
    )
    assert is_fused(fused.base_optimizer)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    for own, theirs in zip(fused.state.values(), plain.state.values(), strict=True):
        assert own.keys() == theirs.keys()
        for key in own:
            assert own[key].dtype == theirs[key].dtype
            torch.testing.assert_close(own[key], theirs[key], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("complex_dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("name", ["lion", "RMSprop"])
def test_complex_parameters(name, complex_dtype):
    """Real and imaginary part by themselves, as both packages have it."""
    results = []
    for make in (lambda cls: cls, unfused):
        cls = make(torch.optim.RMSprop if name == "RMSprop" else lion("pytorch_optimizer"))
        weight = nn.Parameter(torch.tensor([1 + 2j, -0.5j, 0.25], dtype=complex_dtype))
        optimizer = SAM([weight], cls, rho=0.1, lr=0.01, weight_decay=0.1)
        for number in range(4):
            for _ in range(2):
                (weight * (2 - number * 1j) + 1).abs().square().sum().backward()
                optimizer.advance(zero_grad=True)
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=2e-6 if complex_dtype == torch.complex64 else 1e-12, atol=0.0)


def test_a_class_is_recognised_by_what_it_is():
    """A subclass may do anything, and so may a class of the same name."""
    assert base_of(torch.optim.SGD) is sk.SGD and base_of(torch.optim.AdamW) is sk.Adam
    assert base_of(unfused(torch.optim.SGD)) is None
    namesake = type("SGD", (torch.optim.SGD,), {"__module__": "torch.optim.sgd"})
    assert base_of(namesake) is None
    assert base_of(torch.optim.NAdam) is None


def test_no_package_is_imported_to_be_recognised(monkeypatch):
    monkeypatch.delitem(sys.modules, "pytorch_optimizer.optimizer.lion", raising=False)
    namesake = type("Lion", (torch.optim.SGD,), {"__module__": "pytorch_optimizer.optimizer.lion"})
    assert base_of(namesake) is None
    assert "pytorch_optimizer.optimizer.lion" not in sys.modules


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_settings_that_are_tensors_are_left_to_the_base(cls):
    optimizer = one_parameter(cls)
    assert is_fused(optimizer)
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.1)
    assert not is_fused(optimizer)


def test_every_base_is_in_every_list():
    """The structs of the native kernels, Triton's functions and the tests' settings."""
    native = pytest.importorskip("sam_kernels._cpu")
    codes = [base.code for base in BASES]
    assert list(native.BASES) == codes
    pytest.importorskip("triton")
    from sam_kernels.triton.bases import BASES as OF_TRITON

    assert list(OF_TRITON) == codes
