"""Settings: none is taken that cannot be meant, or that would do nothing; all are named in every signature."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

import sam_optim
from sam_kernels import BackendUnavailableError
from sam_optim import (
    AESAM,
    GSAM,
    SAM,
    WSAM,
    AgnosticSAM,
    FriendlySAM,
    IntervalSAM,
    InvalidSettingError,
    LookSAM,
    MomentumSAM,
    RandomizedSAM,
    SharpnessAwareOptimizer,
)
from sam_optim.core.checks import near
from sam_optim.core.settings import SHARED

from .cases import assert_same, batches, loss_of, make_net, weights_of

SGD = torch.optim.SGD
CLASSES = [
    cls
    for cls in vars(sam_optim).values()
    if inspect.isclass(cls) and issubclass(cls, SAM) and not inspect.isabstract(cls)
]


def params():
    return [nn.Parameter(torch.ones(3))]


def made(cls, given=None, base=SGD, **settings):
    given = params() if given is None else given
    settings = {"lr": 0.1, **({"rho": 0.1, "momentum": 0.9} if cls is MomentumSAM else {}), **settings}
    return cls(given, base, **settings)


# ---------------------------------------------------------------------- signatures


def test_the_classes_are_all_there():
    assert len(CLASSES) == 20


@pytest.mark.parametrize("cls", CLASSES)
def test_every_signature_names_every_setting(cls):
    parameters = inspect.signature(cls).parameters
    assert set(SHARED) <= set(parameters)
    assert [name for name, p in parameters.items() if p.kind is p.VAR_KEYWORD] == ["base_kwargs"]
    of_base_class = inspect.signature(SharpnessAwareOptimizer).parameters
    for name in SHARED:
        annotation = parameters[name].annotation
        assert annotation != "Any" or name == "process_group"
        if name in of_base_class:
            assert annotation == of_base_class[name].annotation


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_given_arrives(cls):
    named = make_net().named_parameters()
    more = {"adaptive": "weights", "eta": 0.5, "perturb_eps": 1e-3, "backend": "reference", "master_weights": True}
    optimizer = made(cls, named, **more, closure_runs="second_pass", weight_decay=0.25)
    group = optimizer.param_groups[0]
    assert (group["adaptive"], group["eta"], group["weight_decay"]) == ("weights", 0.5, 0.25)
    assert optimizer._rule.epsilon == 1e-3
    assert (optimizer.backend, optimizer.master_weights, optimizer.closure_runs) == ("reference", True, "second_pass")


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("rho", [None, math.inf, math.nan, -0.1, "0.1", 1j, True, [0.1], torch.ones(2), np.bool_(True)])
@pytest.mark.parametrize("how", ["constructor", "group", "schedule"])
def test_a_radius_is_a_finite_number(rho, how):
    with pytest.raises(InvalidSettingError, match=r"Invalid rho: .*finite number of at least 0"):
        if how == "constructor":
            made(SAM, rho=rho)
        elif how == "group":
            made(SAM, [{"params": params(), "rho": rho}])
        else:
            given = params()
            optimizer = made(SAM, given)
            optimizer.param_groups[0]["rho"] = rho
            given[0].grad = torch.ones(3)
            optimizer.first_step()
    if how == "schedule":
        assert given[0].tolist() == [1.0] * 3 and not optimizer.is_step_begun


@pytest.mark.parametrize("rho", [1, 0.5, np.float32(0.5), np.int64(1), np.array(0.5), torch.tensor(0.5)])
def test_numbers_of_any_kind(rho):
    results = []
    for value in (rho, float(rho)):
        given = params()
        optimizer = made(SAM, given, rho=value)
        for move in (optimizer.first_step, optimizer.second_step):
            given[0].grad = given[0].detach() ** 2
            move()
        results.append(given)
    assert_same(*results)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (SAM, {"eta": math.nan}),
        (SAM, {"eta": "0.1"}),
        (SAM, {"perturb_eps": None}),
        (SAM, {"adaptive": "weight"}),
        (SAM, {"adaptive": None}),
        (SAM, {"master_weights": "yes"}),
        (SAM, {"counts_in_norm": True}),
        (SAM, {"closure_runs": "twice"}),
        (WSAM, {"decouple": "no"}),
        (GSAM, {"alpha": "0.4"}),
        (FriendlySAM, {"sigma": math.inf}),
        (LookSAM, {"k": 2.5}),
        (LookSAM, {"k": "5"}),
        (LookSAM, {"alpha": math.nan}),
        (AESAM, {"c": math.nan}),
        (RandomizedSAM, {"seed": 1.5}),
        (RandomizedSAM, {"probability": None}),
        (AgnosticSAM, {"rho_val": math.inf}),
        (AgnosticSAM, {"rho_val": "0.1"}),
        (AgnosticSAM, {"variant": "aligned"}),
        (IntervalSAM, {"every": 2.0}),
        (IntervalSAM, {"every": True}),
        (IntervalSAM, {"every": torch.tensor(2.0)}),
        (IntervalSAM, {"start": "8"}),
        (IntervalSAM, {"start": True}),
    ],
    ids=str,
)
def test_what_cannot_be_meant(cls, settings):
    with pytest.raises(InvalidSettingError, match=f"Invalid {next(iter(settings))}: "):
        made(cls, **settings)


@pytest.mark.parametrize("value", ["no", None, 2, "False"])
def test_perturb_is_true_or_false(value):
    with pytest.raises(InvalidSettingError, match="Invalid perturb"):
        made(SAM, [{"params": params(), "perturb": value}])


@pytest.mark.parametrize("every", [2, np.int32(2), torch.tensor(2)])
def test_whole_numbers_of_any_kind(every):
    assert made(IntervalSAM, every=every).every == 2


def test_a_start_that_is_a_share():
    """Of 10 steps the last two are SAM's, as with the number of the step."""
    results = []
    for settings in ({"start": 0.8, "total_steps": 10}, {"start": 8}, {"start": 8, "total_steps": 10}):
        model, passes = make_net(), []
        optimizer = made(IntervalSAM, model.parameters(), every=1, rho=0.1, **settings)
        for batch in batches(10):
            passes.append(0)
            for _ in optimizer.each_pass():
                loss_of(model, batch).backward()
                passes[-1] += 1
        assert passes == [1] * 8 + [2] * 2
        results.append(weights_of(model))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert made(IntervalSAM, start=0.29, total_steps=100).start == 29  # 0.29 * 100 is a little less
    assert made(IntervalSAM, start=torch.tensor(0.5), total_steps=np.int64(10)).start == 5


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"start": 0.8}, "Invalid start: 0.8; .*give total_steps"),
        ({"start": 1.0, "total_steps": 10}, "Invalid start: 1.0; .*below 1"),
        ({"start": -0.5, "total_steps": 10}, "Invalid start"),
        ({"start": 10, "total_steps": 10}, "none would be SAM's"),
        ({"start": 0.99, "total_steps": 10}, "none would be SAM's"),
        ({"start": 0.5, "total_steps": 10.5}, "Invalid total_steps"),
    ],
    ids=str,
)
def test_a_start_that_never_comes(settings, match):
    with pytest.raises(InvalidSettingError, match=match):
        made(IntervalSAM, **settings)


def test_the_custom_of_one_step_is_one_of_two():
    model = make_net()
    optimizer = made(SAM, model.parameters())
    before = weights_of(model)
    loss_of(model, batches(1)[0]).backward()
    for custom in ("twice", ""):
        with pytest.raises(InvalidSettingError, match="Invalid closure_runs"):
            optimizer.step(lambda: 0.0, closure_runs=custom)
    assert_same(weights_of(model), before)


def test_backends_are_looked_up_at_once(monkeypatch):
    for wrong in ("cudaa", 3, ""):
        with pytest.raises(ValueError, match=f"Invalid backend: {wrong!r}; there are cuda, triton, cpu, foreach"):
            made(SAM, backend=wrong)

    class Missing:
        @staticmethod
        def unavailable_reason():
            return "no such device here"

    monkeypatch.setitem(import_module("sam_kernels.registry")._BACKENDS, "cuda", Missing)
    with pytest.raises(BackendUnavailableError, match="'cuda' is unavailable: no such device here"):
        made(SAM, backend="cuda")


# ---------------------------------------------------------------------- groups


@pytest.mark.parametrize("key", ["pertrub", "perturbed", "Rho", "roh", "adaptiv"])
@pytest.mark.parametrize("added", [False, True])
def test_misspelt_keys_of_groups(key, added):
    with pytest.raises(InvalidSettingError, match=f"{key!r} in a group, .* Did you mean"):
        if added:
            made(SAM).add_param_group({"params": params(), key: False})
        else:
            made(SAM, [{"params": params(), key: False}])


@pytest.mark.parametrize(
    ("cls", "key"),
    [
        (AgnosticSAM, "rho_train"),
        (IntervalSAM, "total_steps"),
        (SAM, "backend"),
        (GSAM, "master_weights"),
    ],
)
def test_settings_of_the_whole_optimizer_are_none_of_a_groups(cls, key):
    with pytest.raises(InvalidSettingError, match=f"{key} has no effect in a group: .*A group may set rho, adaptive"):
        made(cls, [{"params": params(), key: 0.5}])


def test_what_else_is_in_a_group_is_its_owners_business():
    """As with torch's optimizers: annotations, keys of schedules, settings of other methods, what the base knows."""
    foreign = {"name": "head", "lr_scale": 0.5, "meta": 1, "beta": 2, "sigma": 3, "initial_lr": 0.1, 7: 7}
    optimizer = made(SAM, [{"params": params(), **foreign}])
    assert foreign.items() <= optimizer.param_groups[0].items()
    optimizer.add_param_group({"params": params(), **foreign})
    # The base has an alpha of its own.
    assert made(GSAM, [{"params": params(), "alpha": 0.9}], torch.optim.RMSprop).param_groups[0]["alpha"] == 0.9


def test_counts_of_steps_stay_loadable():
    for cls, key in ((LookSAM, "looksam_step"), (IntervalSAM, "occasional_step")):
        given = params()
        optimizer = made(cls, given)
        for _ in optimizer.each_pass():
            given[0].grad = torch.ones(3)
        other = made(cls)
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0][key] == 1
        # And a base that was another's before, whose groups have them.
        assert SAM(given, optimizer.base_optimizer).param_groups[0][key] == 1


@pytest.mark.parametrize("name", ["rho", "zzz", "eta_min", "betas", "meta", "perturbation_of_others"])
def test_names_that_are_near_to_none(name):
    assert near(name, ["rho", "eta", "adaptive", "perturb"]) is None


# ---------------------------------------------------------------------- keywords


class Swallowing(torch.optim.SGD):
    """Takes anything, and keeps it in its groups; of which it reads one."""

    def __init__(self, params, lr, **kwargs):
        super().__init__(params, lr)
        for group in self.param_groups:
            group.update(kwargs)
        self.defaults.update(kwargs)

    def step(self, closure=None):
        assert self.param_groups[0].get("twist") is not None
        return super().step(closure)


def popping(params, **kwargs):
    decay = kwargs.pop("decay")
    return SGD(params, weight_decay=decay, **kwargs)


UNKNOWN = [
    (Swallowing, "roh", "Did you mean rho"),
    (Swallowing, "use_gc", "knows: use_gc$"),
    (Swallowing, "pertrub_eps", "Did you mean perturb_eps"),
    (Swallowing, "momentun", "Did you mean momentum"),
    (lambda params, **kwargs: SGD(params, lr=0.1), "roh", "Did you mean rho"),
    (lambda params, **kwargs: SGD(params, lr=0.1), "weight_deacy", "Did you mean weight_decay"),
    (partial(popping, decay=0.1), "zzz", "zzz"),
]


@pytest.mark.parametrize(("base", "keyword", "match"), UNKNOWN, ids=lambda x: str(x)[:20])
def test_keywords_that_nobody_knows(base, keyword, match):
    with pytest.raises(TypeError, match=match):
        made(SAM, base=base, **{keyword: 0.5})


def test_what_the_base_refuses_itself_may_have_been_meant_for_the_method():
    with pytest.raises(TypeError, match="unexpected keyword argument 'roh'") as caught:
        made(SAM, roh=0.5)
    assert caught.value.__notes__ == ["SAM knows no roh either. Did you mean rho?"]


def test_keywords_that_somebody_knows():
    made(SAM, base=Swallowing, twist=1)
    assert made(SAM, base=popping, decay=0.5).param_groups[0]["weight_decay"] == 0.5
    assert made(SAM, base=partial(popping, decay=0.5)).param_groups[0]["weight_decay"] == 0.5
    assert made(SAM, base=partial(popping, momentum=0.5), decay=0.1).param_groups[0]["momentum"] == 0.5
    assert made(SAM, base=lambda params, **kwargs: SGD(params, **kwargs), momentum=0.5).defaults["momentum"] == 0.5
    assert made(SAM, base=lambda params, lr: SGD(params, lr)).defaults["lr"] == 0.1


def test_keywords_of_pytorch_optimizers():
    """They keep whatever they are given in their groups, and look for some of it there."""
    others = pytest.importorskip("pytorch_optimizer")
    for keyword in ("roh", "use_gc", "pertrub_eps"):
        with pytest.raises(TypeError, match=f"AdaBelief, knows: {keyword}"):
            made(SAM, base=others.AdaBelief, **{keyword: 0.5})
    assert made(SAM, base=others.AdaBelief, adanorm=True).param_groups[0]["adanorm"]
    assert made(SAM, base=others.AdaFactor, beta1=0.5)
    assert made(SAM, base=lambda p, **kwargs: others.Lookahead(torch.optim.AdamW(p, **kwargs)), weight_decay=0.5)


# ---------------------------------------------------------------------- defaults


def test_defaults_can_be_written_as_in_torch():
    optimizer = made(SAM, momentum=0.9)
    optimizer.defaults["lr"] = 0.5
    optimizer.defaults["rho"] = 0.25
    for other in (optimizer, pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert isinstance(other.defaults, dict)
        assert other.defaults["lr"] == 0.5
        other.add_param_group({"params": params()})
        assert {"lr": 0.5, "rho": 0.25, "momentum": 0.9}.items() <= other.param_groups[1].items()
        assert other.param_groups[0]["lr"] == 0.1
    optimizer.defaults = {**optimizer.defaults, "lr": 0.7}
    optimizer.add_param_group({"params": params()})
    assert optimizer.param_groups[2]["lr"] == 0.7
    optimizer.defaults["rho"] = -1.0
    with pytest.raises(InvalidSettingError, match="Invalid rho: -1"):
        optimizer.add_param_group({"params": params()})
    assert len(optimizer.param_groups) == 3


def test_defaults_of_the_base_count_as_before():
    optimizer = made(SAM)
    assert "rho" not in optimizer.base_optimizer.defaults
    optimizer.base_optimizer.defaults["lr"] = 0.5
    optimizer.add_param_group({"params": params()})
    assert optimizer.param_groups[1]["lr"] == 0.5
    optimizer.defaults["lr"] = 0.7
    optimizer.add_param_group({"params": params()})
    assert optimizer.param_groups[2]["lr"] == 0.7


def test_schedulers_that_look_at_defaults():
    optimizer = made(SAM, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    assert optimizer.param_groups[0]["momentum"] == 0.95
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(made(SAM, base=torch.optim.Adagrad), max_lr=0.1, total_steps=10)


def test_a_group_that_is_none():
    with pytest.raises(TypeError, match="param_group must be a dict"):
        made(SAM).add_param_group("x")
