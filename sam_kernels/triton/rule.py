"""Rules of a user's own, compiled into the launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .layout import MAX_RULE_PARAMETERS


@dataclass(frozen=True)
class TritonRule:
    """A rule that Triton kernels apply within a launch, and other backends between two.

    It goes wherever a rule goes: ``sam_kernels.ascent_(..., rule=rule)``, ``Update(..., rule=rule)`` of ``sam_optim``.

    Args:
        function: a ``@triton.jit`` function of ``(gram, parameters)``. ``gram[i][j]`` is the float64 scalar <x_i, x_j>,
            ``len(gram)`` the number of gradient lists, ``parameters[i]`` a float64 scalar. Returns a tuple of one
            coefficient for each list. It is never asked about a Gram matrix that is not finite: what it returns is then
            replaced by zeros.
        definition: the same in torch: from the Gram matrix, a float64 tensor of shape (k, k), and the parameters to a
            tensor of k coefficients. Other backends and a list of tensors on several devices use it.
        parameters: up to four numbers. Changing them compiles nothing anew.

    Raises:
        ValueError: for more parameters than that.
    """

    function: Any
    definition: Callable[[Tensor, tuple[float, ...]], Tensor]
    parameters: tuple[float, ...] = ()

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(float(value) for value in self.parameters))
        if len(self.parameters) > MAX_RULE_PARAMETERS:
            raise ValueError(f"Invalid parameters: {self.parameters}; a rule has at most {MAX_RULE_PARAMETERS} numbers")

    def __call__(self, gram: Tensor) -> Tensor:
        return self.definition(gram, self.parameters)
