"""What a method asks of the driver that runs its gradient passes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Self

from torch import Tensor

from sam_kernels.rules import Fixed, RuleLike
from sam_kernels.scales import Scale

from .errors import InvalidSettingError

Gradients = list[Tensor | None]

# The coefficients of an update that names no rule: ones.
FIXED = Fixed()

TRAIN = "train"
VALIDATION = "validation"
PREVIOUS = "previous"
MEMORY = "memory"

_DATA = (TRAIN, VALIDATION, PREVIOUS, MEMORY)


class _Fields(NamedTuple):
    data: str
    perturbed: bool
    kept: bool
    may_be_empty: bool
    last: bool
    weights: Sequence[Tensor] | None


class Pass(_Fields):
    """One gradient evaluation.

    Attributes:
        data: which batch: ``"train"``; ``"validation"`` for methods that use a second one; ``"previous"`` for the
            training batch of the step before; ``"memory"`` for a batch of samples of earlier tasks.
        perturbed: the model holds perturbed weights. Such a pass uses the random draws of the unperturbed pass on the
            same data (dropout), and leaves BatchNorm's running statistics alone.
        may_be_empty: there may be no such batch; then the pass leaves no gradients.
        kept: the method reads this gradient again after later passes, so ``p.grad`` must not be written into before
            the step ends. The driver takes the gradients away from the parameters.
        last: no pass follows in this step. The base optimizer's update is made from what ``p.grad`` then holds, alone
            or with gradients of earlier passes. Drivers that leave the update to somebody else's ``step()`` need to
            know this.
        weights: the weights to take the gradient at, a tensor for each parameter; None for those of the model. Only for
            passes that are yielded together, to a driver that runs them side by side.

    Raises:
        InvalidSettingError: for any other data, since no driver would know which batch is meant.
    """

    __slots__ = ()

    def __new__(
        cls,
        data: str = TRAIN,
        perturbed: bool = False,
        kept: bool = False,
        may_be_empty: bool = False,
        last: bool = False,
        weights: Sequence[Tensor] | None = None,
    ) -> Self:
        if data not in _DATA:
            raise InvalidSettingError(f"Invalid data of a Pass: {data!r}; it is one of {', '.join(_DATA)}")
        return tuple.__new__(cls, (data, perturbed, kept, may_be_empty, last, weights))

    @property
    def updates_statistics(self) -> bool:
        """Whether running statistics learn from this pass: once a step from each batch that is trained on."""
        return not self.perturbed and self.data in (TRAIN, MEMORY)


class PassGroup:
    """Passes that do not depend on each other.

    Attributes:
        passes: one or more.
        gradients: of each pass, an entry for each parameter; filled by the driver.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = passes
        self.gradients: Sequence[Gradients] = ()


class Update:
    """The base optimizer's update of the unperturbed weights: what a method yields once it has all gradients.

    Args:
        *lists: gradient lists x_i; the update uses sum_i scale_i c_i x_i.
        rule: computes the coefficients c from the lists' Gram matrix; ones by default.
        scale: a number, or one for each group and list.
    """

    __slots__ = ("lists", "rule", "scale")

    def __init__(self, *lists: Gradients, rule: RuleLike | None = None, scale: Scale = 1.0) -> None:
        self.lists, self.scale = lists, scale
        self.rule: RuleLike = FIXED if rule is None else rule

    @property
    def is_one_gradient(self) -> bool:
        """Whether it uses a single list as it is."""
        return len(self.lists) == 1 and self.rule == FIXED and isinstance(self.scale, float) and self.scale == 1.0


# A method yields a pass and is sent its gradients: an entry for each parameter, None where there is none. Or it yields
# several passes that do not depend on each other, and is sent a list of as many gradients. Last it yields the update.
Passes = Generator[Pass | Sequence[Pass] | Update, Any, None]
