"""Any optimizer as the base: all of torch's, and the hundred of pytorch-optimizer."""

from __future__ import annotations

import copy
import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sam_optim import SAM, FriendlySAM, InvalidSettingError, LookSAM, SAMPa, StepOrderError
from sam_optim.core.base_update import FusedState

from .cases import assert_same, batches, loss_of, make_net, step_by_hand, weights_of

TORCHS = ["Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


# They want a closure, a whole model, matrices alone, second derivatives, settings without a default or another package.
NOT_FOR_THIS = [
    "adago",
    "adahessian",
    "adalomo",
    "adammini",
    "adamuon",
    "alig",
    "bsam",
    "demo",
    "distributedmuon",
    "lbfgs",
    "lomo",
    "muon",
    "muonclip",
    "normuon",
    "ranger21",
    "sophiah",
    "spectralsphere",
]
REFUSED = ["adadelta"]  # its setting rho is another one
FLOAT32_ONLY = ["fadam"]
TURNS_OVER = ["soap"]  # between eigenvectors, which the last bit of a gradient chooses


def others() -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pytorch_optimizer
    except ImportError:
        return []
    known = set(pytorch_optimizer.get_supported_optimizers())
    return sorted(known - set(NOT_FOR_THIS) - set(REFUSED))


def made(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name in TORCHS:
        cls = getattr(torch.optim, name)
    else:
        import pytorch_optimizer

        cls = pytorch_optimizer.load_optimizer(name)
    settings = {"lr": 0.01} if "lr" in inspect.signature(cls.__init__).parameters else {}
    return cls(model.parameters(), **settings)


def sam_by_hand(model, base, batch, rho=0.1):
    """e = rho g / |g|, then the base's own step with the gradient at w + e."""
    base.zero_grad()
    loss_of(model, batch).backward()
    before = weights_of(model)
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    with torch.no_grad():
        for p, w in zip(model.parameters(), before, strict=True):
            p.copy_(w + rho * p.grad / norm)
    base.zero_grad()
    loss_of(model, batch).backward()
    with torch.no_grad():
        for p, w in zip(model.parameters(), before, strict=True):
            p.copy_(w)
    base.step()


def train(name, make_step, dtype=torch.float32, steps=3):
    """Weights after some steps; some bases draw random numbers."""
    torch.manual_seed(5)
    model = make_net(dtype)
    step = make_step(model, made(name, model))
    torch.manual_seed(6)
    np.random.seed(6)  # kron draws from this one
    for batch in batches(steps, dtype):
        step(batch)
    return weights_of(model)


def alone(model, base):
    def step(batch):
        base.zero_grad()
        loss_of(model, batch).backward()
        base.step()

    return step


def by_formula(model, base):
    return lambda batch: sam_by_hand(model, base, batch)


def by_sam(rho):
    def make_step(model, base):
        optimizer = SAM(model.parameters(), base, rho=rho)
        return lambda batch: step_by_hand(optimizer, model, batch)

    return make_step


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*TORCHS, *others()])
def test_every_base(name):
    """With rho 0 the base by itself, bit for bit; with rho SAM's formula around it."""
    wanted = train(name, alone)
    assert_same(train(name, by_sam(0.0)), wanted)
    dtype = torch.float32 if name in FLOAT32_ONLY else torch.float64
    found, expected = (train(name, how, dtype) for how in (by_sam(0.1), by_formula))
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all()
        # A sign, or a decomposition of a matrix, makes a difference in the last bit of a gradient a larger one.
        assert name in TURNS_OVER or (a - b).abs().mean() < 1e-4 + 1e-3 * b.abs().mean()


def test_a_base_with_settings_of_the_same_name():
    """torch's Adadelta has a rho too, 0.9, which was taken for SAM's."""
    with pytest.raises(InvalidSettingError, match="Adadelta cannot be the base optimizer: it keeps rho in its groups"):
        SAM([nn.Parameter(torch.ones(2))], torch.optim.Adadelta, rho=0.05)


def test_a_base_that_was_anothers_base_before():
    """Its groups have the settings of the SAM before, which go on."""
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    SAM(model.parameters(), base, rho=0.3)
    assert SAM(model.parameters(), copy.copy(base)).param_groups[0]["rho"] == 0.3


class Plain:
    """An optimizer that is none of torch's: groups, state and a step."""

    def __init__(self, params, lr):
        self.param_groups = [{"params": list(params), "lr": lr}]
        self.state = {}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad


def test_a_base_that_is_not_torchs():
    found = []
    for base in (Plain, torch.optim.SGD):
        model = make_net()
        optimizer = SAM(model.parameters(), base, rho=0.1, lr=0.05, backend="foreach")
        for batch in batches(3):
            step_by_hand(optimizer, model, batch)
        found.append(weights_of(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_an_instance_that_is_not_torchs():
    """schedulefree's wrapper is one."""
    model = make_net()
    base = Plain(model.parameters(), 0.05)
    optimizer = SAM(model.parameters(), base, rho=0.1)
    assert optimizer.base_optimizer is base
    step_by_hand(optimizer, model, batches(1)[0])


def alone_from_the_second(model, base):
    """SAMPa with rho and lam 0 updates with the batch of the step before."""
    optimizer = SAMPa(model.parameters(), base, rho=0.0, lam=0.0)
    previous = None

    def step(batch):
        nonlocal previous
        for p in optimizer.each_pass():
            loss_of(model, previous if p.data == "previous" else batch).backward()
        previous = batch

    return step


class Several:
    """Optimizers side by side, as people put Muon for matrices and AdamW for the rest; none of torch's."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self):
        return {p: entries for optimizer in self.optimizers for p, entries in optimizer.state.items()}

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def several(model):
    params = list(model.parameters())
    return Several(torch.optim.AdamW(params[::2], lr=0.02), torch.optim.SGD(params[1::2], lr=0.05, momentum=0.9))


@pytest.mark.parametrize("method", [SAM, FriendlySAM])
def test_a_base_whose_state_dict_is_a_list(method):
    """It has no state_dict() as torch's have it, and nothing of it may be lost."""
    first, then = batches(6)[:3], batches(6)[3:]
    model, other = make_net(), make_net()
    optimizer = method(model.parameters(), several(model), rho=0.1)
    for batch in first:
        step_by_hand(optimizer, model, batch)
    other.load_state_dict(model.state_dict())
    resumed = method(other.parameters(), several(other), rho=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for batch in then:
        step_by_hand(optimizer, model, batch)
        step_by_hand(resumed, other, batch)
    assert_same(weights_of(other), weights_of(model))


def test_such_a_bases_own_checkpoint():
    model, other = make_net(), make_net()
    base = several(model)
    step_by_hand(SAM(model.parameters(), base, rho=0.1), model, batches(1)[0])
    optimizer = SAM(other.parameters(), several(other), rho=0.1)
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same([v for v in base.state[p].values() if v.dim()], [v for v in optimizer.state[q].values() if v.dim()])


class LoadsByItself(torch.optim.SGD):
    """It saves as torch does and loads by itself, without hooks, as bitsandbytes' optimizers do."""

    def load_state_dict(self, state_dict):
        params = [p for group in self.param_groups for p in group["params"]]
        groups = [
            {**saved, "params": own["params"]}
            for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        self.param_groups = groups
        self.state.clear()
        self.state.update({params[k]: dict(entries) for k, entries in state_dict["state"].items()})


@pytest.mark.parametrize("method", [SAM, FriendlySAM, LookSAM])
@pytest.mark.parametrize("by_base", [False, True])
def test_a_base_that_loads_by_itself(method, by_base):
    model, other = make_net(), make_net()
    optimizer, resumed = (method(m.parameters(), LoadsByItself, rho=0.1, lr=0.05, momentum=0.9) for m in (model, other))
    for batch in batches(3):
        step_by_hand(optimizer, model, batch)
    other.load_state_dict(model.state_dict())
    saved, loaded = (o.base_optimizer if by_base else o for o in (optimizer, resumed))
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for batch in batches(6)[3:]:
        step_by_hand(optimizer, model, batch)
        step_by_hand(resumed, other, batch)
    assert_same(weights_of(other), weights_of(model))
    state = resumed.base_optimizer.state
    assert not any(key.startswith("sam_optim_") for entries in state.values() for key in entries)


class Slow(torch.optim.Optimizer):
    """A Lookahead as many are written: it never calls the constructor of torch's optimizers."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        for group in self.param_groups:
            group.update(alpha=0.5, k=2, counter=0)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        for group in self.param_groups:
            group["counter"] += 1
            for p in group["params"] if group["counter"] % group["k"] == 0 else ():
                p.copy_(self.slow[p].lerp_(p, group["alpha"]))


@pytest.mark.parametrize("method", [SAM, LookSAM])  # LookSAM has settings of the names k and alpha
def test_a_wrapper_without_torchs_constructor(method):
    found = []
    for how in (by_formula, by_sam(0.1)):
        model = make_net()
        step = how(model, Slow(torch.optim.AdamW(model.parameters(), lr=0.02)))
        for batch in batches(4):
            step(batch)
        found.append(weights_of(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    model = make_net()
    own = type("Slow", (Slow,), {})  # loading lets torch change the class
    optimizer = method(model.parameters(), own(torch.optim.AdamW(model.parameters(), lr=0.02)), rho=0.1)
    step_by_hand(optimizer, model, batches(1)[0])
    assert optimizer.param_groups[0]["k"] == 2
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_a_setting_of_the_same_name_within_a_wrapper():
    model = make_net()
    with pytest.raises(InvalidSettingError, match="Slow cannot be the base optimizer: it keeps rho in its groups"):
        SAM(model.parameters(), Slow(torch.optim.Adadelta(model.parameters())), rho=0.05)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("is_early", [False, True])
def test_a_step_that_somebody_has_put_in_place(cls, is_early):
    """Torch calls it, so it is called here too; a scheduler's wrapper of step() changes nothing."""
    found = []
    for replaces in (False, True):
        model = make_net()
        base = cls(model.parameters(), lr=0.05)
        calls = []
        optimizer = None if is_early else SAM(model.parameters(), base, rho=0.1)
        if replaces:
            own = base.step
            base.step = lambda closure=None, own=own, calls=calls: calls.append(own(closure))
        optimizer = optimizer or SAM(model.parameters(), base, rho=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
        for batch in batches(3):
            step_by_hand(optimizer, model, batch)
            scheduler.step()
        assert len(calls) == (3 if replaces else 0)
        found.append(weights_of(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_schedulers_step_is_the_bases():
    base = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    assert FusedState(base).settings() is not None
    torch.optim.lr_scheduler.StepLR(base, 1)
    assert "step" in vars(base) and FusedState(base).settings() is not None


def test_a_learning_rate_that_the_base_finds_itself():
    optimizer = SAM([nn.Parameter(torch.ones(2))], Plain, lr=None)
    with pytest.raises(StepOrderError, match="none is begun"):
        optimizer.step()


# They count in groups, in themselves or in state of a wrapper's own, draw random numbers, or change state in place.
LOOKING_AHEAD = ["adabelief", "gravity", "kron", "lamb", "madgrad", "magma", "ranger", "schedulefreeadamw", "spam"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*TORCHS, *(name for name in LOOKING_AHEAD if name in others())])
def test_a_look_ahead_leaves_the_base_as_it_was(name):
    assert_same(train(name, alone_from_the_second, steps=5), train(name, alone, steps=4))


class Packed(torch.Tensor):
    """A state of two parts, as those of low-bit optimizers, of which little can be asked as a whole."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, meta, size, stride):
        return cls(parts["codes"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


class LowBit(torch.optim.Optimizer):
    """Momentum in 8 bits."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = Packed(torch.zeros_like(p, dtype=torch.int8), p.new_ones(()))
                packed = self.state[p]["momentum"]
                momentum = packed.codes * packed.scale * 0.9 + p.grad
                packed.scale.copy_(momentum.abs().max().clamp_min(1e-9) / 127)
                packed.codes.copy_((momentum / packed.scale).round())
                p.sub_(momentum, alpha=group["lr"])


def test_a_look_ahead_with_states_that_cannot_be_cloned():
    found = []
    for how, steps in ((alone_from_the_second, 5), (alone, 4)):
        model = make_net()
        step = how(model, LowBit(model.parameters(), 0.05))
        for batch in batches(5)[:steps]:
            step(batch)
        found.append(weights_of(model))
    assert_same(*found)


class Matrices(nn.Module):
    """Muon and its like take nothing else."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(7, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_base_for_matrices_alone():
    found = []
    for how in (by_sam(0.1), by_formula, by_sam(0.0), alone):
        torch.manual_seed(1)
        model = Matrices()
        step = how(model, torch.optim.Muon(model.parameters(), lr=0.01))
        for batch in batches(3, torch.float32):
            step(batch)
        found.append(weights_of(model))
    assert_same(found[2], found[3])
    for a, b in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what cannot be a base


class AdaHessian(torch.optim.SGD):
    pass


class OfAnotherName(torch.optim.SGD):
    def step(self, closure=None, hessian=None):
        raise NotImplementedError


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        raise NotImplementedError


class NeedsMore(torch.optim.SGD):
    def step(self, closure=None, *, losses):
        raise NotImplementedError


class InBackward(torch.optim.SGD):
    def fused_backward(self, loss, lr):
        raise NotImplementedError


class AnotherSAM(torch.optim.SGD):
    def first_step(self):
        raise NotImplementedError


class SingleSamples(torch.optim.SGD):
    """As opacus' DPOptimizer, of the gradients of single samples."""

    grad_samples = ()


class AcceleratedOptimizer(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (AdaHessian, "differentiates p.grad once more"),
        (OfAnotherName, "differentiates p.grad once more"),
        (NeedsClosure, "its step\\(\\) needs closure"),
        (NeedsMore, "its step\\(\\) needs losses"),
        (InBackward, "within the backward pass"),
        (AnotherSAM, "passes of its own"),
        (SingleSamples, "every pass adds to"),
        (AcceleratedOptimizer, "prepared it already"),
    ],
)
def test_what_cannot_be_a_base(cls, message):
    model = make_net()
    with pytest.raises(TypeError, match=f"{cls.__name__} cannot be a base optimizer: .*{message}"):
        SAM(model.parameters(), cls, lr=0.1)
    with pytest.raises(TypeError, match="cannot be a base optimizer"):
        SAM(model.parameters(), cls(model.parameters(), lr=0.1))
    if "its step" not in message:  # the wrapper may know what that wants
        with pytest.raises(TypeError, match=f"{cls.__name__} cannot be a base optimizer: .*{message}"):
            SAM(model.parameters(), Slow(cls(model.parameters(), lr=0.1)))


def test_a_base_is_not_replaced():
    """Half of what is here would go on with the one before, without a word."""
    model = make_net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    optimizer.base_optimizer = optimizer.base_optimizer
    base = optimizer.base_optimizer
    with pytest.raises(InvalidSettingError, match=r"by Adam.*made for SGD.*SAM\(params, Adam, ...\)"):
        optimizer.base_optimizer = torch.optim.Adam(model.parameters())
    assert optimizer.base_optimizer is base


def test_a_wrapper_for_single_samples_is_driven_by_hand():
    model = make_net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    wrapper = SingleSamples(model.parameters(), lr=0.1)
    with pytest.raises(StepOrderError, match=r"SingleSamples cannot make the update of each_pass.*pre_step\(\)"):
        next(optimizer.each_pass(step=wrapper.step))
    assert not optimizer.is_step_begun


def test_steps_that_are_differentiated_are_no_base():
    for base in (torch.optim.SGD, torch.optim.AdamW):
        with pytest.raises(TypeError, match="differentiable=True asks for steps that autograd differentiates"):
            SAM(make_net().parameters(), base, lr=0.1, differentiable=True)


@pytest.mark.parametrize("name", ["adahessian", "sophiah", "lomo", "adalomo"])
def test_others_that_cannot(name):
    others = pytest.importorskip("pytorch_optimizer")
    model = make_net()
    given = model if "lomo" in name else model.parameters()
    with pytest.raises(TypeError, match="cannot be a base optimizer"):
        SAM(model.parameters(), others.load_optimizer(name)(given, lr=0.1))


def test_arguments_in_the_order_of_other_packages():
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments in ((base, model), (model.parameters(), model), (base, torch.optim.SGD)):
        with pytest.raises(TypeError, match=r"the order is SAM\(model.parameters\(\), base_optimizer"):
            SAM(*arguments, rho=0.1)


def test_an_optimizer_without_groups():
    class Hollow(torch.optim.Optimizer):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match="Hollow cannot be a base optimizer: it has no param_groups"):
        SAM([nn.Parameter(torch.ones(2))], Hollow())


class Failing(torch.optim.SGD):
    """It fails half-way."""

    def step(self, closure=None):
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1.0)
        raise RuntimeError("no second derivatives")


def test_what_a_base_raises_says_whose_it_is():
    model = make_net()
    optimizer = SAM(model.parameters(), Failing, rho=0.1, lr=0.1)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="no second derivatives") as raised:
        step_by_hand(optimizer, model, batches(1)[0])
    assert any("step() of the base optimizer, Failing" in note for note in raised.value.__notes__)
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun


# ---------------------------------------------------------------- schedule-free bases


class Averaging(torch.optim.SGD):
    """Two modes, as schedule-free optimizers have them: eval() shows the mean of the weights so far."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.trains = False
        self.means = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        if not self.trains:
            raise RuntimeError("not in train mode")
        super().step()
        self.count += 1
        for p, mean in self.means.items():
            mean.lerp_(p, 1.0 / self.count)

    def train(self):
        self._change(True)

    def eval(self):
        self._change(False)

    @torch.no_grad()
    def _change(self, trains):
        if trains != self.trains and self.count:
            for p, mean in self.means.items():
                kept = p.clone()
                p.copy_(mean)
                mean.copy_(kept)
        self.trains = trains


def schedule_free():
    found = [lambda params: Averaging(params, 0.05)]
    try:
        from pytorch_optimizer import ScheduleFreeAdamW
    except ImportError:
        return found
    return [*found, lambda params: ScheduleFreeAdamW(params, lr=0.05)]


@pytest.mark.parametrize("make_base", schedule_free())
def test_train_and_eval_are_the_bases(make_base):
    found = []
    for by_hand in (False, True):
        model = make_net()
        base = make_base(model.parameters())
        optimizer = base if by_hand else SAM(model.parameters(), base, rho=0.1)
        shown = []
        for batch in batches(4):
            optimizer.train()
            if by_hand:
                sam_by_hand(model, base, batch)
            else:
                step_by_hand(optimizer, model, batch)
            optimizer.eval()
            shown += weights_of(model)
        found.append(shown)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_modes_are_there_where_the_base_has_them():
    model = make_net()
    plain = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    assert not hasattr(plain, "train") and not hasattr(plain, "eval")
    with pytest.raises(AttributeError, match="its base optimizer SGD has none"):
        plain.eval()
    assert hasattr(SAM(model.parameters(), Averaging, lr=0.1), "train")


def test_modes_change_between_steps():
    model = make_net()
    optimizer = SAM(model.parameters(), Averaging, rho=0.1, lr=0.1)
    batch = batches(1)[0]
    optimizer.begin()
    optimizer.train()  # as Hugging Face's Trainer does: the weights are still what they were
    optimizer.restore()
    for _ in range(2):
        step_by_hand(optimizer, model, batch)
    before = weights_of(model)
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    optimizer.train()  # as Hugging Face's Trainer does before each micro-batch
    with pytest.raises(StepOrderError, match="eval\\(\\) was called in the middle of a step"):
        optimizer.eval()
    optimizer.restore()
    assert_same(weights_of(model), before)
    optimizer.eval()
    assert not torch.equal(next(model.parameters()), before[0])
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(StepOrderError, match="train\\(\\) was called in the middle of a step"):
        optimizer.train()
