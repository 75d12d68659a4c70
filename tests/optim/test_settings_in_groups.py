"""Settings of methods as keys of the groups: checkpoints, schedules, values of a group's own, bases with such keys."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import sam_optim
from sam_optim import (
    AESAM,
    ASAM,
    CRSAM,
    GNP,
    GSAM,
    MGSERSAM,
    SAM,
    USAM,
    WSAM,
    AgnosticSAM,
    AlignSAM,
    FriendlySAM,
    IntervalSAM,
    InvalidSettingError,
    LookSAM,
    MomentumSAM,
    RandomizedSAM,
    SAMPa,
    StableSAM,
    TrainStep,
    UnifiedSAM,
    VaSSO,
)

from .cases import assert_same, batches, loss_of, make_net, weights_of

SGD = torch.optim.SGD
OF_SAM = {"rho": 0.2, "adaptive": True, "eta": 0.3, "perturb_eps": 1e-3}

# Of each method values of its own settings that are not its defaults.
OTHERS = {
    SAM: {},
    ASAM: {"adaptive": "elementwise"},
    GSAM: {"alpha": 0.25},
    GNP: {"alpha": 0.25},
    StableSAM: {},
    WSAM: {"gamma": 0.25, "decouple": False},
    FriendlySAM: {"sigma": 0.5, "lmbda": 0.25},
    LookSAM: {"k": 3, "alpha": 0.25},
    CRSAM: {"gamma": 0.25, "beta": 0.5},
    UnifiedSAM: {"k": 0.25},
    USAM: {},
    VaSSO: {"theta": 0.25},
    MomentumSAM: {},
    IntervalSAM: {"every": 3, "start": 1},
    RandomizedSAM: {"probability": 0.25, "seed": 7},
    AESAM: {"c": 0.25, "decay": 0.5},
    AgnosticSAM: {"rho_val": 0.05, "variant": "align", "normalizer": "first", "smoothing": 0.5},
    AlignSAM: {"rho_val": 0.05, "smoothing": 0.5},
    SAMPa: {"lam": 0.25, "warm_start": "zero"},
    MGSERSAM: {"mu": 0.25},
}
WRONG = {
    "rho": -1.0,
    "adaptive": "weight",
    "eta": -1.0,
    "perturb_eps": -1.0,
    "alpha": math.nan,
    "gamma": -0.5,
    "decouple": "no",
    "sigma": -1.0,
    "lmbda": 1.5,
    "k": -1,
    "beta": -1.0,
    "theta": 0.0,
    "every": 0,
    "start": -1,
    "probability": 1.5,
    "seed": 0.5,
    "c": math.inf,
    "decay": 1.0,
    "rho_val": -1.0,
    "variant": "aligned",
    "normalizer": "second",
    "smoothing": 1.0,
    "lam": 1.5,
    "warm_start": "hot",
    "mu": -1.0,
}
EACH = [(cls, name) for cls in OTHERS for name in cls.setting_names()]
OWN = [(cls, name) for cls, own in OTHERS.items() for name in own if name != "adaptive"]
WHOLE = [
    (GSAM, "alpha"),
    (WSAM, "decouple"),
    (FriendlySAM, "sigma"),
    (FriendlySAM, "lmbda"),
    (LookSAM, "k"),
    (UnifiedSAM, "k"),
    (VaSSO, "theta"),
    (IntervalSAM, "every"),
    (IntervalSAM, "start"),
    (RandomizedSAM, "probability"),
    (RandomizedSAM, "seed"),
    (AESAM, "c"),
    (AESAM, "decay"),
    (AgnosticSAM, "variant"),
    (AgnosticSAM, "normalizer"),
    (AgnosticSAM, "smoothing"),
    (SAMPa, "warm_start"),
    (SAM, "perturb_eps"),
]


def params(count=1):
    return [nn.Parameter(torch.ones(3)) for _ in range(count)]


def made(cls, given=None, base=SGD, **settings):
    needed = {"momentum": 0.9} if cls is MomentumSAM and base is SGD else {}
    if cls is ASAM:
        settings.setdefault("adaptive", True)
    return cls(params() if given is None else given, base, **{"lr": 0.1, **needed, **settings})


def others(cls):
    return {**OF_SAM, **OTHERS[cls]}


def one_step(optimizer):
    for _ in optimizer.each_pass():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = p.detach().clone()


def train(optimizer, model, count=3, skip=0):
    step = TrainStep(model, optimizer, loss_of)
    data = list(zip(batches(skip + count), batches(skip + count, size=5), strict=True))
    kind = "memory_batch" if isinstance(optimizer, MGSERSAM) else "validation_batch"
    for number, (batch, other) in enumerate(data[skip:]):
        more = {"previous_batch": data[skip - 1][0]} if isinstance(optimizer, SAMPa) and skip and not number else {}
        step(batch, **{kind: other}, **more)


# ---------------------------------------------------------------------- declarations


def test_all_methods_are_here():
    classes = {c for c in vars(sam_optim).values() if inspect.isclass(c) and issubclass(c, SAM)}
    assert classes == set(OTHERS)


@pytest.mark.parametrize("cls", OTHERS)
def test_every_setting_of_a_signature_is_declared(cls):
    shared = {"closure_runs", "backend", "master_weights", "process_group", "counts_in_norm"}
    of_constructor = {"self", "params", "base_optimizer", "base_kwargs", "total_steps", "rho_train"}
    named = set(inspect.signature(cls.__init__).parameters) - shared - of_constructor
    assert named == set(cls.setting_names()) == {"rho", "adaptive", "eta", "perturb_eps", *OTHERS[cls]}


@pytest.mark.parametrize(("cls", "name"), EACH)
def test_groups_hold_what_is_given(cls, name):
    value = others(cls)[name]
    optimizer = made(cls, [{"params": p} for p in params(2)], **{name: value})
    assert [group[name] for group in optimizer.param_groups] == [value, value]
    assert getattr(optimizer, name) == value


@pytest.mark.parametrize("cls", OTHERS)
def test_a_method_is_made_of_a_dict_of_settings(cls):
    optimizer = made(cls, **others(cls))
    for settings in (optimizer.settings(), {n: optimizer.param_groups[0][n] for n in cls.setting_names()}):
        assert settings == others(cls)
        again = made(cls, **settings)
        assert again.settings() == settings
        assert again.param_groups[0].keys() == optimizer.param_groups[0].keys()


def test_names_of_one_radius():
    for settings in ({"rho": 0.2}, {"rho_train": 0.2}):
        assert made(AgnosticSAM, **settings).param_groups[0]["rho"] == 0.2
    assert AgnosticSAM(params(), SGD, 0.2, lr=0.1).rho == 0.2
    assert made(AgnosticSAM).rho == 0.05
    assert made(MomentumSAM).rho == 3.0
    with pytest.raises(InvalidSettingError, match="two names of one radius"):
        made(AgnosticSAM, rho=0.05, rho_train=0.1)


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(("cls", "name"), EACH)
@pytest.mark.parametrize("how", ["constructor", "group", "added", "assigned", "in the group"])
def test_wrong_values(cls, name, how):
    wrong, given = WRONG[name], params()
    with pytest.raises(InvalidSettingError, match=f"Invalid {name}: "):
        if how == "constructor":
            made(cls, **{name: wrong})
        elif how == "group":
            made(cls, [{"params": given, name: wrong}])
        elif how == "added":
            made(cls).add_param_group({"params": given, name: wrong})
        elif how == "assigned":
            setattr(made(cls), name, wrong)
        else:
            optimizer = made(cls, given)
            one_step(optimizer)
            one_step(optimizer)
            before = weights_of(nn.ParameterList(given))
            optimizer.param_groups[0][name] = wrong
            one_step(optimizer)
    if how == "in the group":
        assert_same(weights_of(nn.ParameterList(given)), before)
        assert not optimizer.is_step_begun


def test_a_tensor_that_is_written_into_is_looked_at_again():
    alpha = torch.tensor(0.5)
    optimizer = made(GSAM, alpha=alpha)
    one_step(optimizer)
    alpha.fill_(-1.0)
    with pytest.raises(InvalidSettingError, match="Invalid alpha"):
        one_step(optimizer)


@pytest.mark.parametrize(("cls", "name"), OWN)
def test_an_assigned_value_is_that_of_all_groups(cls, name):
    value = OTHERS[cls][name]
    optimizer = made(cls, [{"params": p} for p in params(2)])
    setattr(optimizer, name, value)
    optimizer.add_param_group({"params": params()})
    assert [group[name] for group in optimizer.param_groups] == [value] * 3


def test_a_setting_that_a_class_has_fixed():
    for cls, name, value in ((USAM, "k", 0.0), (AlignSAM, "variant", "align")):
        optimizer = made(cls)
        assert getattr(optimizer, name) == value and name not in optimizer.param_groups[0]
        with pytest.raises(InvalidSettingError, match=f"Invalid {name}: .* with {cls.__name__} it is"):
            setattr(optimizer, name, value)
        with pytest.raises(InvalidSettingError, match=f"Invalid {name} in a group: with {cls.__name__} it is"):
            made(cls, [{"params": params(), name: value}])
        with pytest.raises(TypeError, match=name):
            made(cls, **{name: value})


class Derived(GSAM):
    """As somebody may write it, with an attribute of the name of a setting, and a setting in a group."""

    def __init__(self, params, base, alpha, **kwargs):
        self.alpha = alpha
        assert self.alpha == alpha
        super().__init__(params, base, alpha=alpha, **kwargs)


def test_a_derived_class():
    optimizer = Derived(params(), SGD, 0.25, lr=0.1)
    optimizer.alpha *= 2
    assert optimizer.param_groups[0]["alpha"] == 0.5
    assert Derived.setting_names() == GSAM.setting_names()
    with pytest.raises(AttributeError):
        _ = GSAM.__new__(GSAM).alpha


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies(copied):
    optimizer = made(GSAM, base=torch.optim.RMSprop, alpha=0.25)
    twin = copied(optimizer)
    twin.alpha = 0.5
    assert (optimizer.alpha, twin.alpha) == (0.25, 0.5)
    one_step(twin)


def test_a_copy_from_before_settings_were_in_the_groups():
    """Refused at once, not where its first step looks for them."""
    state = made(GSAM).__getstate__()
    older = {key: value for key, value in state.items() if key not in ("_keys", "_watched", "_looked_at")}
    with pytest.raises(ValueError, match=r"an older version of sam_optim.* save its state_dict\(\) there"):
        GSAM.__new__(GSAM).__setstate__({**older, "alpha": 0.25, "base_optimizer": state["_base"]})


# ---------------------------------------------------------------------- groups that differ


@pytest.mark.parametrize(("cls", "name"), WHOLE)
def test_what_has_to_be_the_same_in_all_groups(cls, name):
    value, match = others(cls)[name], f"Invalid {name}: .*must be the same in all groups"
    first, second = params(2)
    with pytest.raises(InvalidSettingError, match=match):
        made(cls, [{"params": first}, {"params": second, name: value}])
    for way in ("set", "added"):
        optimizer = made(cls, [first] if way == "added" else [{"params": first}, {"params": second}])
        if way == "set":
            optimizer.param_groups[1][name] = value
        else:
            optimizer.add_param_group({"params": second, name: value})
        before = [first.detach().clone(), second.detach().clone()]
        with pytest.raises(InvalidSettingError, match=match):
            one_step(optimizer)
        assert_same([first.detach(), second.detach()], before)
        assert not optimizer.is_step_begun
        for group in optimizer.param_groups:
            group[name] = value
        one_step(optimizer)


def test_equal_values_are_the_same():
    given = params(3)
    optimizer = made(GSAM, [{"params": given[0], "alpha": 1}, {"params": given[1], "alpha": 1.0}], alpha=torch.ones(()))
    optimizer.add_param_group({"params": given[2], "alpha": torch.ones(1)})
    one_step(optimizer)
    assert optimizer.alpha == 1.0


def test_reading_one_value_of_groups_that_differ():
    optimizer = made(WSAM, [{"params": p, "gamma": gamma} for p, gamma in zip(params(2), (0.25, 0.5), strict=True)])
    with pytest.raises(InvalidSettingError, match=r"gamma differs between the groups: 0.25, 0.5"):
        _ = optimizer.gamma
    assert optimizer.per_group("gamma", "rho") == [[0.25, 0.05], [0.5, 0.05]]
    optimizer.gamma = 0.75
    assert optimizer.per_group("gamma") == [[0.75], [0.75]]


A = torch.tensor([1.0, 4.0], dtype=torch.float64)
A_MEMORY = torch.tensor([2.0, 0.5], dtype=torch.float64)
RHO, LR = 0.5, 0.1


class ByHand:
    """Plain SGD on L = 1/2 w' diag(1, 4) w, where a setting is a vector: one number for each of the two weights."""

    def __init__(self, method, settings):
        self.w = torch.tensor([3.0, 1.0], dtype=torch.float64)
        self.method, self.s, self.kept, self.number = method, settings, None, 0

    def step(self):
        direction = getattr(self, self.method.__name__.lower())()
        self.w = self.w if direction is None else self.w - LR * direction
        self.number += 1

    def ascended(self, g, sign=1.0):
        return self.w + sign * RHO * g / g.norm()

    def wsam(self):
        g = A * self.w
        a = self.s["gamma"] / (1 - self.s["gamma"])
        return (1 - a) * g + a * A * self.ascended(g)  # coupled or not: the same for plain SGD

    def gnp(self):
        g = A * self.w
        return (1 - self.s["alpha"]) * g + self.s["alpha"] * A * self.ascended(g)

    def crsam(self):
        g = A * self.w
        g_plus, g_minus = A * self.ascended(g), A * self.ascended(g, -1.0)
        return g_plus + self.s["gamma"] * (g_plus + g_minus - 2 * g) + self.s["beta"] * (g_plus - g_minus)

    def looksam(self):
        g = A * self.w
        if self.number % 2:
            return g + self.s["alpha"] * g.norm() / self.kept.norm() * self.kept
        g_plus = A * self.ascended(g)
        self.kept = g_plus - g.dot(g_plus) / g.dot(g) * g
        return g_plus

    def mgsersam(self):
        g_memory = A_MEMORY * self.w
        return (A + A_MEMORY) * self.ascended(A * self.w + g_memory) + self.s["mu"] * g_memory

    def sampa(self):
        if self.kept is None:
            self.kept = A * self.w
            return None
        g_y, ahead = self.kept, self.w - LR * self.kept
        self.kept = A * ahead
        return (1 - self.s["lam"]) * A * self.ascended(g_y) + self.s["lam"] * self.kept


PER_GROUP = [
    (WSAM, {"gamma": (0.2, 0.6)}, {}),
    (WSAM, {"gamma": (0.2, 0.6)}, {"decouple": False}),
    (GNP, {"alpha": (0.0, 0.8)}, {}),
    (CRSAM, {"gamma": (0.5, 0.1), "beta": (0.0, 0.3)}, {}),
    (LookSAM, {"alpha": (0.7, 0.2)}, {"k": 2}),
    (MGSERSAM, {"mu": (0.0, 0.5)}, {}),
    (SAMPa, {"lam": (0.2, 0.9)}, {}),
]


@pytest.mark.parametrize(("cls", "settings", "more"), PER_GROUP)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_value_for_each_group(cls, settings, more, backend, scheduled):
    weights = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (3.0, 1.0)]
    groups = [{"params": w, **{name: pair[i] for name, pair in settings.items()}} for i, w in enumerate(weights)]
    optimizer = cls(groups, SGD, rho=RHO, lr=LR, backend=backend, **more)
    wanted = ByHand(cls, {name: torch.tensor(pair, dtype=torch.float64) for name, pair in settings.items()})
    for number in range(6):
        if scheduled and number == 3:
            for name in settings:
                optimizer.param_groups[1][name] = 0.25
                wanted.s[name][1] = 0.25
        for p in optimizer.each_pass():
            for w, a in zip(weights, A_MEMORY if p.data == "memory" else A, strict=True):
                (0.5 * a * w**2).sum().backward()
        wanted.step()
        assert torch.cat(weights).tolist() == pytest.approx(wanted.w.tolist(), abs=1e-12)


@pytest.mark.parametrize("cls", [GSAM, FriendlySAM, VaSSO, UnifiedSAM, LookSAM, AESAM, AgnosticSAM])
def test_a_schedule(cls):
    """As if the optimizer had been made anew with the values, weights and state of that step."""
    results = []
    for anew in (False, True):
        model = make_net()
        optimizer = made(cls, model.parameters())
        train(optimizer, model)
        own = {name: value for name, value in OTHERS[cls].items() if name not in ("variant", "normalizer")}
        if anew:
            saved = copy.deepcopy(optimizer.state_dict())
            for group in saved["param_groups"]:
                group.update(own)
            optimizer = made(cls, model.parameters(), **own)
            optimizer.load_state_dict(saved)
        else:
            for group in optimizer.param_groups:
                group.update(own)
        train(optimizer, model, skip=3)
        results.append(weights_of(model))
    assert_same(*results)


# ---------------------------------------------------------------------- checkpoints


BASES = [SGD, torch.optim.RMSprop, torch.optim.Adam]


def by_file(optimizer, other):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))


def by_base(optimizer, other):
    other.base_optimizer.load_state_dict(copy.deepcopy(optimizer.base_optimizer.state_dict()))


@pytest.mark.parametrize("way", [by_file, by_base])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cls", OTHERS)
def test_a_checkpoint_restores_each_setting(cls, base, way):
    more = {"momentum": 0.9} if cls is MomentumSAM and base is torch.optim.RMSprop else {}
    optimizer, other = made(cls, base=base, **others(cls), **more), made(cls, base=base, **more)
    assert all(other.settings()[name] != value for name, value in others(cls).items())
    way(optimizer, other)
    assert other.settings() == others(cls)
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()


@pytest.mark.parametrize("cls", OTHERS)
def test_a_run_goes_on_with_the_settings_of_its_checkpoint(cls):
    """In an optimizer that was made with others."""
    results = []
    for resumes in (False, True):
        model = make_net()
        optimizer = made(cls, model.parameters(), **others(cls))
        train(optimizer, model)
        if resumes:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = made(cls, model.parameters())
            optimizer.load_state_dict(saved)
        train(optimizer, model, skip=3)
        results.append(weights_of(model))
    assert_same(*results)


@pytest.mark.parametrize("cls", OTHERS)
def test_a_checkpoint_from_before_settings_were_in_the_groups(cls):
    optimizer, other = made(cls), made(cls, **others(cls))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for name in (*cls.setting_names(), "sam_optim_method"):
            if name not in ("rho", "adaptive", "eta", "rho_val"):
                del group[name]
    other.load_state_dict(saved)
    kept = {name: value for name, value in others(cls).items() if name not in ("rho", "adaptive", "eta", "rho_val")}
    assert other.settings() == {**optimizer.settings(), **kept}
    one_step(other)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("is_old", [False, True])
def test_distributed_checkpoints(flat, is_old, tmp_path):
    """What is loaded is what the new optimizer has keys for; an old one lacks some, which torch has to be told."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = make_net(), make_net()
    optimizer, new = made(GSAM, model.parameters(), rho=0.2, alpha=0.25), made(GSAM, other.parameters(), alpha=0.75)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    if is_old:
        for holder in [saved] if flat else saved["param_groups"]:
            for key in [key for key in holder if key.split(".")[-1] in ("alpha", "perturb_eps", "sam_optim_method")]:
                del holder[key]
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    loaded = get_optimizer_state_dict(other, new, options=options)
    planner = DefaultLoadPlanner(allow_partial_load=True) if is_old else None
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True, planner=planner)
    set_optimizer_state_dict(other, new, loaded, options=options)
    assert (new.rho, new.alpha) == (0.2, 0.75 if is_old else 0.25)


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "stays"),
    [
        (GSAM, LookSAM, {"alpha": 0.7}),
        (GSAM, GNP, {"alpha": 0.8}),
        (WSAM, CRSAM, {"gamma": 0.1}),
        (LookSAM, UnifiedSAM, {"k": 0.5}),
        (UnifiedSAM, USAM, {"k": 0.0}),
        (GSAM, SAM, {}),
    ],
)
def test_a_checkpoint_of_another_method(saved_by, loaded_by, stays):
    """rho is the same to all of them, and is restored; a name that means something else to the other is not."""
    optimizer, other = made(saved_by, **others(saved_by)), made(loaded_by)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.rho == 0.2
    assert {name: getattr(other, name) for name in stays} == stays
    one_step(other)


def test_a_checkpoint_of_the_class_that_one_is_derived_from():
    other = Derived(params(), SGD, 0.5, lr=0.1)
    other.load_state_dict(made(GSAM, alpha=0.25).state_dict())
    assert other.alpha == 0.25


def test_a_group_that_is_added_after_loading():
    """It has the setting that the others have now."""
    optimizer = made(GSAM)
    optimizer.load_state_dict(made(GSAM, alpha=0.25).state_dict())
    optimizer.add_param_group({"params": params()})
    optimizer.base_optimizer.add_param_group({"params": params()})
    one_step(optimizer)
    assert [group["alpha"] for group in optimizer.param_groups] == [0.25] * 3


@pytest.mark.parametrize(("cls", "name"), OWN)
def test_a_group_that_has_not_got_its_settings_yet(cls, name):
    """Whoever asks before the next step is told what it will have."""
    optimizer = made(cls, **{name: OTHERS[cls][name]})
    for groups in (optimizer.base_optimizer.param_groups, optimizer.param_groups):
        groups.append({"params": params()})
        assert getattr(optimizer, name) == OTHERS[cls][name]
    one_step(optimizer)
    assert [group[name] for group in optimizer.param_groups] == [OTHERS[cls][name]] * 3
    optimizer.param_groups[:] = [{"params": params()}]
    assert getattr(optimizer, name) == OTHERS[cls][name]
    optimizer.param_groups.clear()
    assert getattr(optimizer, name) == OTHERS[cls][name]


@pytest.mark.parametrize("cls", [UnifiedSAM, WSAM, AgnosticSAM])
def test_what_depends_on_settings_when_a_group_was_added_to_the_base(cls):
    """What a class promises with its settings is asked for before a step begins."""
    net = make_net()
    *rest, last = net.parameters()
    optimizer = made(cls, rest, **OTHERS[cls])
    step = TrainStep(net, optimizer, loss_of)
    optimizer.base_optimizer.add_param_group({"params": last})
    before = last.detach().clone()
    step(batches(1)[0], validation_batch=batches(1, size=5)[0])
    assert not torch.equal(last, before)


def test_a_radius_that_is_none_keeps_nobody_from_saving():
    optimizer = made(SAM)
    one_step(optimizer)
    optimizer.param_groups[0]["rho"] = math.nan
    optimizer.base_optimizer.add_param_group({"params": params()})
    assert math.isnan(optimizer.state_dict()["param_groups"][0]["rho"])
    with pytest.raises(InvalidSettingError, match="Invalid rho"):
        one_step(optimizer)


# ---------------------------------------------------------------------- bases with keys of the same name


def test_a_base_that_has_such_a_key():
    """RMSprop's alpha is .99, and stays its own."""
    model, wanted = make_net(), make_net()
    base = torch.optim.RMSprop
    optimizer = GSAM([{"params": list(model.parameters()), "alpha": 0.5}], base, rho=0.1, alpha=0.25, lr=0.01)
    group = optimizer.param_groups[0]
    assert (group["alpha"], group["sam_optim_alpha"], optimizer.alpha) == (0.5, 0.25, 0.25)
    assert optimizer.group_key("alpha") == "sam_optim_alpha" and optimizer.group_key("rho") == "rho"
    other = made(GSAM, wanted.parameters(), lambda p, lr: base(p, lr, alpha=0.5), rho=0.1, alpha=0.25, lr=0.01)
    train(optimizer, model)
    train(other, wanted)
    assert_same(weights_of(model), weights_of(wanted))
    optimizer.alpha = 0.75
    assert (group["alpha"], group["sam_optim_alpha"]) == (0.5, 0.75)
    optimizer.add_param_group({"params": params()})
    assert (optimizer.param_groups[1]["alpha"], optimizer.param_groups[1]["sam_optim_alpha"]) == (0.99, 0.75)
    added = {"params": params(), "alpha": 0.5, "sam_optim_alpha": 0.75}
    optimizer.add_param_group(added)
    assert (added["alpha"], added["sam_optim_alpha"]) == (0.5, 0.75)


def test_such_a_key_of_a_base_that_has_none():
    with pytest.raises(InvalidSettingError, match="sam_optim_alpha has no effect in a group"):
        made(GSAM, [{"params": params(), "sam_optim_alpha": 0.5}])


def test_checkpoints_of_a_base_that_has_such_a_key():
    rmsprop = torch.optim.RMSprop
    saved = made(GSAM, base=rmsprop, alpha=0.25).state_dict()
    plain = rmsprop(params(), lr=0.1, alpha=0.5)
    plain.load_state_dict(copy.deepcopy(saved))
    assert plain.param_groups[0]["alpha"] == 0.99
    # What is the plain base's restores the base's.
    optimizer = made(GSAM, base=rmsprop, alpha=0.75)
    optimizer.load_state_dict(rmsprop(params(), lr=0.1, alpha=0.5).state_dict())
    assert (optimizer.alpha, optimizer.param_groups[0]["alpha"]) == (0.75, 0.5)
    # To and from a base that has none.
    with_sgd = made(GSAM, alpha=0.5)
    with_sgd.load_state_dict(copy.deepcopy(saved))
    assert with_sgd.alpha == with_sgd.param_groups[0]["alpha"] == 0.25
    assert "sam_optim_alpha" not in with_sgd.param_groups[0]
    optimizer.load_state_dict(copy.deepcopy(with_sgd.state_dict()))
    assert (optimizer.alpha, optimizer.param_groups[0]["alpha"]) == (0.25, 0.5)
    # Another method's under such a key.
    other = made(LookSAM, base=rmsprop)
    other.load_state_dict(copy.deepcopy(saved))
    assert (other.alpha, other.param_groups[0]["alpha"]) == (0.7, 0.99)


COLLISIONS = [
    (GSAM, "ademamix"),
    (GSAM, "racs"),
    (LookSAM, "madgrad"),
    (LookSAM, "dadaptadan"),
    (UnifiedSAM, "ranger"),
    (CRSAM, "racs"),
    (CRSAM, "adagc"),
    (WSAM, "adabound"),
    (VaSSO, "racs"),
    (VaSSO, "asgd"),
    (AESAM, "amos"),
    (AgnosticSAM, "a2grad"),
]


@pytest.mark.parametrize(("cls", "name"), COLLISIONS)
def test_bases_of_pytorch_optimizer(cls, name):
    """Their steps are what they are without us in the groups."""
    base = pytest.importorskip("pytorch_optimizer").load_optimizer(name)
    [alone] = base([nn.Parameter(torch.ones(2, 2))]).param_groups
    optimizer = cls([nn.Parameter(torch.ones(2, 2))], base, **others(cls))
    [group] = optimizer.param_groups
    renamed = [setting for setting in cls.setting_names() if optimizer.group_key(setting) != setting]
    assert renamed
    for setting in renamed:
        assert group[f"sam_optim_{setting}"] == others(cls)[setting]
        assert (setting in alone) == (setting in group) and group.get(setting) == alone.get(setting)
    assert optimizer.settings() == others(cls)


@pytest.mark.parametrize("cls", [cls for cls in OTHERS if OTHERS[cls]])
def test_steps_with_a_base_that_has_each_key(cls):
    """No key that we have put into the groups is taken for a misspelt one, in steps and in groups that come later."""
    names = [name for name in OTHERS[cls] if name not in ("adaptive", "rho_val")]  # which no base may have

    class Base(SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            for name in names:
                self.defaults[name] = 0.5
                self.param_groups[0][name] = 0.5

    optimizer = made(cls, base=Base, **OTHERS[cls])
    one_step(optimizer)
    optimizer.add_param_group({**optimizer.param_groups[0], "params": params()})
    one_step(optimizer)
    assert optimizer.settings() == made(cls, **OTHERS[cls]).settings()


def test_a_base_that_was_anothers_before():
    """Its groups have the settings of the method before: rho goes on, as it always has; what is a method's own not."""
    given = params()
    first = made(GSAM, given, rho=0.2, alpha=0.25)
    second = LookSAM(given, first.base_optimizer)
    assert (second.rho, second.alpha, second.k) == (0.2, 0.7, 5)
    third = GSAM(given, second.base_optimizer, alpha=0.5)
    assert third.alpha == 0.5
    fourth = GSAM(third.param_groups, SGD, alpha=0.75, lr=0.1)
    assert fourth.alpha == 0.75
    one_step(fourth)
    fifth = WSAM(params(), SGD, lr=0.1)
    fifth.add_param_group({**made(CRSAM, gamma=0.25).param_groups[0]})
    assert fifth.gamma == 0.9


def test_values_in_the_groups_of_a_base_that_was_nobodys():
    given = params(2)
    base = SGD([{"params": p, "gamma": gamma} for p, gamma in zip(given, (0.25, 0.5), strict=True)], lr=0.1)
    assert WSAM(given, base).per_group("gamma") == [[0.25], [0.5]]
