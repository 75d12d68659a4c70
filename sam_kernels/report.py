"""What a launch found out: its Gram matrix, coefficients, and whether they were finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LaunchReport:
    """Scalars of one ascent or descent, converted to tensors only when read.

    Attributes:
        finite: False if the Gram matrix held a NaN or an infinity, and the launch changed no weight because of it.
        gram: float64 tensor of shape (k, k); NaN where the launch needed none.
        coefficients: float64 tensor of shape (k,), of the k gradient lists, before rho and other scales.
    """

    __slots__ = ("_coefficients", "_gram", "finite")

    def __init__(self, finite: bool, gram: Tensor | Sequence[float], coefficients: Tensor | Sequence[float]) -> None:
        self.finite = finite
        self._gram = gram
        self._coefficients = coefficients

    @property
    def coefficients(self) -> Tensor:
        return torch.as_tensor(self._coefficients, dtype=torch.float64)

    @property
    def gram(self) -> Tensor:
        gram = torch.as_tensor(self._gram, dtype=torch.float64)
        count = len(self._coefficients)
        return gram if gram.dim() == 2 else gram.reshape(-1)[: count * count].reshape(count, count)

    @property
    def norms(self) -> Tensor:
        """Norms of the gradient lists in the launch's geometry, float64, shape (k,)."""
        return self.gram.diagonal().sqrt()

    def __repr__(self) -> str:
        return f"LaunchReport(finite={self.finite}, norms={self.norms.tolist()})"
