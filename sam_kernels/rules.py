"""Scalar rules: from the Gram matrix of the gradient lists to one coefficient for each list.

A rule is any callable that takes the Gram matrix, a float64 tensor of shape (k, k) with ``G[i, j] = <x_i, x_j>``, and
returns k coefficients. The rules below are known to the kernels, which then need one launch; any other callable costs
two launches and its own few scalar operations, at the same speed in bytes.

``csrc/common/rules.h`` states the same formulas for the native backends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeGuard

import torch
from torch import Tensor

__all__ = ["NORM_EPSILON", "Deflected", "Fixed", "NormMatched", "Normalized", "NormalizedSum", "Rule", "RuleLike"]

RuleLike = Callable[[Tensor], Tensor]


class LaunchRule(Protocol):
    """A rule that some backend can apply within a launch."""

    @property
    def needs_gram(self) -> bool:
        """Whether its coefficients depend on the Gram matrix."""

    def __call__(self, gram: Tensor, /) -> Tensor: ...


# torch's optimizers and the SAM classes in use guard the division by the norm with this number.
NORM_EPSILON = 1e-12


@dataclass(frozen=True)
class Rule:
    """A rule that the kernels know. ``code`` is its number in ``csrc/common/rules.h``."""

    code: ClassVar[int] = -1
    needs_gram: ClassVar[bool] = True
    epsilon: float = NORM_EPSILON
    alpha: float = 0.0

    def __call__(self, gram: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Fixed(Rule):
    """c_i = 1: the scales say it all. The plain update, and WSAM, GNP and SAMPa through their scales."""

    code: ClassVar[int] = 0
    needs_gram: ClassVar[bool] = False

    def __call__(self, gram: Tensor) -> Tensor:
        return torch.ones(gram.shape[0], dtype=torch.float64, device=gram.device)


@dataclass(frozen=True)
class Normalized(Rule):
    """c_i = 1 / (|x_i| + epsilon). SAM (Foret et al. 2021, eq. 2); ASAM in its geometry; Agnostic-SAM with two."""

    code: ClassVar[int] = 1

    def __call__(self, gram: Tensor) -> Tensor:
        return 1.0 / (gram.diagonal().sqrt() + self.epsilon)


@dataclass(frozen=True)
class Deflected(Rule):
    """Lists (g+, g): g+ - alpha h, with h the part of g orthogonal to g+. GSAM (Zhuang et al. 2022, eq. 5)."""

    code: ClassVar[int] = 2

    def __call__(self, gram: Tensor) -> Tensor:
        along = torch.where(gram[0, 0] > 0, gram[0, 1] / gram[0, 0], 0.0)
        return torch.stack([1.0 + self.alpha * along, torch.full_like(along, -self.alpha)])


@dataclass(frozen=True)
class NormMatched(Rule):
    """Lists (g+, g): g+ |g| / |g+|. Stable SAM (Tan et al. 2024, arXiv 2401.07250)."""

    code: ClassVar[int] = 3

    def __call__(self, gram: Tensor) -> Tensor:
        ratio = gram[1, 1].sqrt() / (gram[0, 0].sqrt() + self.epsilon)
        return torch.stack([ratio, torch.zeros_like(ratio)])


@dataclass(frozen=True)
class NormalizedSum(Rule):
    """c_i = 1 / (|x_1 + x_2 + ...| + epsilon): SAM along a gradient that comes in parts, which need not be added up."""

    code: ClassVar[int] = 4

    def __call__(self, gram: Tensor) -> Tensor:
        # Lists that cancel may leave a rounding error below zero.
        return (1.0 / (gram.sum().clamp(min=0.0).sqrt() + self.epsilon)).expand(gram.shape[0])


_KNOWN = frozenset((Fixed, Normalized, Deflected, NormMatched, NormalizedSum))


def is_known(rule: object) -> TypeGuard[Rule]:
    """Whether the kernels of every backend can apply a rule. Subclasses may do anything: they are other callables."""
    return type(rule) in _KNOWN
