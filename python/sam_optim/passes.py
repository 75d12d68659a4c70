"""What a method asks of whoever runs its gradient passes."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Pass:
    """One gradient evaluation.

    Attributes:
        data: which batch: ``"train"``, or ``"validation"`` for methods that use a second one.
        perturbed: the model holds perturbed weights. Such a pass uses the random draws of the unperturbed pass on the
            same data (dropout), and leaves BatchNorm's running statistics alone.
    """

    data: str = "train"
    perturbed: bool = False


# A method yields passes and is sent the gradients, one entry for each parameter, None where there is none.
Passes = Generator[Pass, Gradients, None]
