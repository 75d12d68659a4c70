"""What a method asks of whoever runs its gradient passes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Gradients = list[Tensor | None]

TRAIN = "train"
VALIDATION = "validation"
PREVIOUS = "previous"
MEMORY = "memory"


@dataclass(frozen=True)
class Pass:
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
    """

    data: str = TRAIN
    perturbed: bool = False
    kept: bool = False
    may_be_empty: bool = False
    last: bool = False
    weights: Sequence[Tensor] | None = None

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


# A method yields a pass and is sent its gradients, one entry for each parameter, None where there is none. Or it yields
# several passes that do not depend on each other, and is sent a list of as many gradients.
Passes = Generator[Pass | Sequence[Pass], Any, None]
