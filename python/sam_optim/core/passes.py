"""What a method asks of whoever runs its gradient passes."""

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
        may_be_empty: there may be no such batch; the pass then leaves no gradients.
        kept: the method reads this gradient again after later passes, so that ``p.grad`` must not be written into
            before the step ends. Whoever runs the passes takes the gradients away from the parameters.
        last: no pass follows in this step: what ``p.grad`` holds then, the base optimizer's update is made from, alone
            or with gradients of earlier passes. Methods have to say so for drivers that leave the update to somebody
            else's ``step()``.
        weights: where to take the gradient: a tensor for each parameter; None for where the model's weights are. Only
            of passes yielded together, to a driver that runs them side by side.

    Raises:
        InvalidSettingError: for other data; no driver would know which batch is meant.
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
        """Whether running statistics are to learn from this pass: once a step from each batch that is trained on."""
        return not self.perturbed and self.data in (TRAIN, MEMORY)


class PassGroup:
    """Passes that do not depend on each other.

    Attributes:
        passes: one or more.
        gradients: of each pass, an entry for each parameter; to be filled by whoever runs them.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = passes
        self.gradients: Sequence[Gradients] = ()


class Update:
    """The base optimizer's update, of the weights themselves: what a method yields once it has all gradients.

    Args:
        *lists: gradient lists; the update takes sum_i scale_i c_i x_i.
        rule: makes the coefficients c of the lists' Gram matrix; ones by default.
        scale: a number, or one for each group and list.
    """

    __slots__ = ("lists", "rule", "scale")

    def __init__(self, *lists: Gradients, rule: RuleLike | None = None, scale: Scale = 1.0) -> None:
        self.lists, self.scale = lists, scale
        self.rule: RuleLike = FIXED if rule is None else rule

    @property
    def is_one_gradient(self) -> bool:
        """Whether it takes a single list as it is."""
        return len(self.lists) == 1 and self.rule == FIXED and isinstance(self.scale, float) and self.scale == 1.0


# A method yields a pass and is sent its gradients, one entry for each parameter, None where there is none. Or it yields
# several passes that do not depend on each other, and is sent a list of as many gradients. Last comes the update.
Passes = Generator[Pass | Sequence[Pass] | Update, Any, None]
