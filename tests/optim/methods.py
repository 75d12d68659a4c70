"""Every method with settings and its formula: here tests choose what they run, by name or by property.

To add a method, write its formula here, with settings for the tests above it::

    @method(GSAM, rho=0.1, alpha=0.4)
    def gsam(w, t, gradient, base, kept, *, rho, alpha):
        g = gradient(w)
        ...
        return base(w, g_plus - alpha * h)

That is all: the generic tests of formulas, drivers, checkpoints, GradScaler, exceptions and so on then run it. What the
class says of itself (``takes_scaled_gradients``, ``is_capturable``, ...) is read from it; what else differs from SAM
stands in the decorator (the fields of :class:`Method`). A second decorator above the same formula adds other settings;
give it a name of its own.

A formula makes one step, of float64 vectors that hold all parameters one after the other::

    w         the weights
    t         the operator T(w) of ASAM's geometry: |w| + eta, or ones
    gradient  gradient(w) is that on the training batch; gradient(w, "validation"), "memory" and "previous" on others
    base      base(w, x) is where a step of the base optimizer leads; base.look_ahead(w, x) too, its state untouched
    kept      what the method keeps from step to step: a dictionary, empty at first

It returns the weights after the step. Settings are keywords; ``adaptive`` and ``eta`` are in t.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

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
    LookSAM,
    MomentumSAM,
    RandomizedSAM,
    SAMPa,
    SharpnessAwareOptimizer,
    StableSAM,
    UnifiedSAM,
    VaSSO,
)

from .bases import SGD, Base
from .cases import make_net


@dataclass(frozen=True, eq=False)
class Method:
    """A method with settings, and what tests have to know of it.

    Attributes:
        oracle: the formula, see above; None in tests that do not compare with one.
        name: for ids, and to find it by.
        by_two_calls: whether ``first_step()`` and ``second_step()`` can drive it, if it has passes on one batch alone:
            there are no more than two in a step, and it knows beforehand which is the last.
        tells_last: whether its passes say beforehand which is the last.
        combines: whether the update takes gradients of several passes on the training batch.
        averages: whether it takes an average of the first gradients of steps, abandoned ones among them.
        has_plain_steps: whether some of its steps are the base optimizer's own.
        needs_momentum: whether the base has to have one.
        is_further: settings to be compared with the formula and left alone by all other tests.
    """

    cls: type[SharpnessAwareOptimizer]
    settings: dict[str, Any]
    oracle: Callable[..., Tensor] | None = None
    name: str = ""
    by_two_calls: bool = True
    tells_last: bool = True
    combines: bool = False
    averages: bool = False
    has_plain_steps: bool = False
    needs_momentum: bool = False
    is_further: bool = False

    def __str__(self) -> str:
        return self.name or ",".join([self.cls.__name__, *(f"{k}={v}" for k, v in self.settings.items())])

    def make(self, model: nn.Module, base: Base, **more: Any) -> SharpnessAwareOptimizer:
        settings = {**self.settings, **copy.deepcopy(base.settings), **more}
        return self.cls(model.named_parameters(), base.cls, **settings)

    def fits(self, base: Base) -> bool:
        return base.has_momentum or not self.needs_momentum

    @cached_property
    def example(self) -> SharpnessAwareOptimizer:
        """To be asked what the class promises of itself under these settings."""
        return self.make(nn.Linear(1, 1), SGD)

    @cached_property
    def needs(self) -> set[str]:
        """The data of its passes besides the training batch: "validation", "memory" or "previous"."""
        layer = nn.Linear(1, 1)
        optimizer, asked = self.make(layer, SGD), set()
        for _ in range(2):
            for p in optimizer.each_pass():
                asked.add(p.data)
                layer(torch.ones(1, 1)).sum().backward()
        return asked - {"train"}

    @property
    def keeps_state(self) -> bool:
        return bool(self.example.method_state_names)

    @property
    def rho_zero(self) -> dict[str, float]:
        """That as a setting, by the class's name for it."""
        return {"rho_train" if "rho_train" in self.settings else "rho": 0.0}


ALL_SETTINGS: list[Method] = []


def method(cls: type[SharpnessAwareOptimizer], variant: str = "", /, **settings: Any) -> Callable[..., Any]:
    """Puts settings of a method, with the formula below it, among those that tests choose from."""
    name = f"{cls.__name__} {variant}".strip()
    fields = {key: settings.pop(key) for key in Method.__dataclass_fields__ if key in settings}

    def add(oracle: Callable[..., Tensor]) -> Callable[..., Tensor]:
        assert name not in [entry.name for entry in ALL_SETTINGS]
        ALL_SETTINGS.append(Method(cls, settings, oracle, name, **fields))
        return oracle

    return add


def methods_with(among: list[Method] | None = None, **properties: Any) -> list[Method]:
    """Of which these are true: fields of :class:`Method`, or attributes of the optimizer."""

    def has(entry: Method, name: str) -> Any:
        return getattr(entry if hasattr(entry, name) else entry.example, name)

    among = METHODS if among is None else among
    return [m for m in among if all(has(m, name) == value for name, value in properties.items())]


def named(name: str) -> Method:
    """That of one name: its class's, and of a variant also the variant's."""
    [found] = [entry for entry in ALL_SETTINGS if entry.name == name]
    return found


def make_sam(
    base: Base = SGD, model: nn.Module | None = None, **more: Any
) -> tuple[nn.Module, SharpnessAwareOptimizer]:
    """SAM of rho 0.1, where a test is of no method in particular."""
    model = model or make_net()
    return model, named("SAM").make(model, base, **more)


def unit(d: Tensor, t: Tensor | float = 1.0) -> Tensor:
    """T^2 d / |T d|: the perturbation along d of length 1 in the geometry T. Zero along zero."""
    return t**2 * d / ((t * d).norm() + 1e-12)


def number_of_step(kept: dict[str, Any]) -> int:
    """From 0; counts up."""
    kept["steps"] = kept.get("steps", -1) + 1
    return kept["steps"]


@method(SAM, rho=0.1)
@method(SAM, "adaptive", rho=1.0, adaptive=True)
@method(SAM, "adaptive with eta", rho=0.5, adaptive="elementwise", eta=0.1)
@method(ASAM, rho=0.5, adaptive="weights")
def sam(w, t, gradient, base, kept, *, rho):
    """arXiv 2010.01412, and 2102.11600 for t."""
    g = gradient(w)
    return base(w, gradient(w + rho * unit(g, t)))


@method(GSAM, rho=0.1, alpha=0.4, combines=True)
def gsam(w, t, gradient, base, kept, *, rho, alpha):
    """arXiv 2203.08065: minus alpha times the part of g that is orthogonal to g+."""
    g = gradient(w)
    g_plus = gradient(w + rho * unit(g, t))
    orthogonal = g - g.dot(g_plus) / g_plus.dot(g_plus) * g_plus
    return base(w, g_plus - alpha * orthogonal)


@method(StableSAM, rho=0.1, combines=True)
def stable_sam(w, t, gradient, base, kept, *, rho):
    """arXiv 2401.07250: g+ of the length of g."""
    g = gradient(w)
    g_plus = gradient(w + rho * unit(g, t))
    return base(w, g_plus * g.norm() / g_plus.norm())


@method(WSAM, rho=0.1, gamma=0.8, decouple=True, combines=True)
@method(WSAM, "coupled", rho=0.1, gamma=0.3, decouple=False, combines=True)
def wsam(w, t, gradient, base, kept, *, rho, gamma, decouple):
    """arXiv 2305.15817, algorithm 2; coupled it is the penalty on the gradient's norm of 2202.03599."""
    a = gamma / (1 - gamma)
    g = gradient(w)
    g_plus = gradient(w + rho * unit(g, t))
    if decouple:
        lr = base.lr
        return base(w, g) - lr * a * (g_plus - g)
    return base(w, (1 - a) * g + a * g_plus)


@method(GNP, rho=0.1, alpha=0.7, combines=True)
def gnp(w, t, gradient, base, kept, *, rho, alpha):
    """arXiv 2202.03599."""
    g = gradient(w)
    return base(w, (1 - alpha) * g + alpha * gradient(w + rho * unit(g, t)))


@method(FriendlySAM, rho=0.1, sigma=0.7, lmbda=0.6, averages=True)
def friendly_sam(w, t, gradient, base, kept, *, rho, sigma, lmbda):
    """arXiv 2403.12350."""
    g = gradient(w)
    m = kept.get("m")
    d = g if m is None else g - sigma * m
    kept["m"] = g if m is None else lmbda * m + (1 - lmbda) * g
    return base(w, gradient(w + rho * unit(d, t)))


@method(LookSAM, rho=0.1, k=3, alpha=0.5)
def look_sam(w, t, gradient, base, kept, *, rho, k, alpha):
    """arXiv 2203.02714, algorithm 1."""
    g = gradient(w)
    if number_of_step(kept) % k != 0:
        return base(w, g + alpha * g.norm() * unit(kept["u"]))
    g_plus = gradient(w + rho * unit(g, t))
    kept["u"] = g_plus - g.dot(g_plus) / g.dot(g) * g
    return base(w, g_plus)


@method(UnifiedSAM, rho=0.1, k=0.3)
@method(USAM, rho=0.1)
def unified_sam(w, t, gradient, base, kept, *, rho, k=0.0):
    """arXiv 2503.02225; with k = 0 USAM, 2206.06232."""
    g = gradient(w)
    e = rho * (1 - k + k / (t * g).norm()) * t**2 * g
    return base(w, gradient(w + e))


@method(VaSSO, rho=0.1, theta=0.4, averages=True)
def vasso(w, t, gradient, base, kept, *, rho, theta):
    """arXiv 2309.15639; the average starts at the first gradient, as in its authors' code."""
    g = gradient(w)
    d = kept["d"] = (1 - theta) * kept.get("d", g) + theta * g
    return base(w, gradient(w + rho * unit(d, t)))


@method(MomentumSAM, rho=0.1, needs_momentum=True)
def momentum_sam(w, t, gradient, base, kept, *, rho):
    """arXiv 2401.12033."""
    v = base.momentum
    return base(w, gradient(w if v is None else w - rho * unit(v, t)))


@method(CRSAM, rho=0.1, gamma=0.3, beta=0.2, combines=True, by_two_calls=False)
def cr_sam(w, t, gradient, base, kept, *, rho, gamma, beta):
    """arXiv 2312.13555, as its authors' code is."""
    g = gradient(w)
    e = rho * unit(g, t)
    g_plus, g_minus = gradient(w + e), gradient(w - e)
    return base(w, g_plus + gamma * (g_plus + g_minus - 2 * g) + beta * (g_plus - g_minus))


@method(IntervalSAM, rho=0.1, every=3, start=1, has_plain_steps=True)
def interval_sam(w, t, gradient, base, kept, *, rho, every, start):
    """SAM in every k-th step from a first one on."""
    number = number_of_step(kept)
    is_sam = number >= start and (number - start) % every == 0
    return sam(w, t, gradient, base, kept, rho=rho) if is_sam else base(w, gradient(w))


@method(RandomizedSAM, rho=0.1, probability=0.5, seed=4, has_plain_steps=True)
def randomized_sam(w, t, gradient, base, kept, *, rho, probability, seed):
    """arXiv 2203.09962 with its weight at 1. The coin is ours: a resumed run, and every rank, tosses as any other."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number_of_step(kept) * 0xD1B54A32D192ED03) % 2**63
    is_sam = torch.rand((), generator=torch.Generator().manual_seed(mixed)).item() < probability
    return sam(w, t, gradient, base, kept, rho=rho) if is_sam else base(w, gradient(w))


@method(AESAM, rho=0.1, c=0.2, has_plain_steps=True, averages=True, tells_last=False, by_two_calls=False)
def ae_sam(w, t, gradient, base, kept, *, rho, c, decay=0.9):
    """arXiv 2304.14647; the averages start at the first square and at zero."""
    g = gradient(w)
    squared = g.dot(g)
    mean, variance = squared, torch.zeros(())
    if kept:
        mean = decay * kept["mean"] + (1 - decay) * squared
        variance = decay * kept["variance"] + (1 - decay) * (squared - mean) ** 2
    kept["mean"], kept["variance"] = mean, variance
    is_sam = squared >= mean + c * variance.sqrt()
    return base(w, gradient(w + rho * unit(g, t)) if is_sam else g)


@method(SAMPa, rho=0.1)
@method(SAMPa, "of lam 0", rho=0.5, lam=0.0, adaptive="elementwise", eta=0.1, is_further=True)
@method(SAMPa, "of lam 1", rho=0.2, lam=1.0, is_further=True)
@method(SAMPa, "from zero", rho=0.2, warm_start="zero", is_further=True)
def sampa(w, t, gradient, base, kept, *, rho, lam=0.2, warm_start="gradient"):
    """arXiv 2410.10683. The first step takes a gradient and leaves the weights."""
    if not kept:
        kept["g_y"] = gradient(w) if warm_start == "gradient" else torch.zeros_like(w)
        return w
    x_tilde = w + rho * unit(kept["g_y"], t)
    y = base.look_ahead(w, kept["g_y"])
    kept["g_y"] = gradient(y)
    return base(w, (1 - lam) * gradient(x_tilde, "previous") + lam * kept["g_y"])


@method(MGSERSAM, rho=0.1, mu=0.7)
def mgser_sam(w, t, gradient, base, kept, *, rho, mu):
    """arXiv 2405.09492, as we read its abstract."""
    g_memory = gradient(w, "memory")
    w_plus = w + rho * unit(gradient(w) + g_memory, t)
    return base(w, gradient(w_plus) + gradient(w_plus, "memory") + mu * g_memory)


@method(AgnosticSAM, rho_train=0.1)
@method(AgnosticSAM, "smoothed", rho_train=0.1, smoothing=0.5, averages=True)
@method(AgnosticSAM, "of named weights", rho_train=0.5, rho_val=0.1, adaptive="weights", is_further=True)
@method(AgnosticSAM, "first", rho_train=0.2, rho_val=0.15, normalizer="first", is_further=True)
def agnostic_sam(
    w, t, gradient, base, kept, *, rho_train, rho_val=None, variant="agnostic", normalizer="own", smoothing=0.0
):
    """arXiv 2406.07107, and Align-SAM; as we read them."""
    rho_val = rho_train / 2 if rho_val is None else rho_val
    g_train, g_val = gradient(w), gradient(w, "validation")
    d = g_val if variant == "align" else gradient(w + rho_val * unit(g_val, t), "validation")
    d = kept["m"] = smoothing * kept.get("m", torch.zeros_like(w)) + (1 - smoothing) * d
    length = (t * (g_val if normalizer == "first" else d)).norm()
    return base(w, gradient(w + rho_train * unit(g_train, t) - rho_val * t**2 * d / length))


@method(AlignSAM, rho=0.2)
def align_sam(w, t, gradient, base, kept, *, rho):
    """The later form of arXiv 2406.07107."""
    return agnostic_sam(w, t, gradient, base, kept, rho_train=rho, variant="align")


METHODS = [entry for entry in ALL_SETTINGS if not entry.is_further]
