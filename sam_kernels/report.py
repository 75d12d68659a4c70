"""What a launch found out: its Gram matrix, coefficients, and whether they were finite."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .scales import float64


class LaunchReport:
    """Scalars of one ascent or descent.

    Those of a launch on a GPU stay there until they are read: reading ``finite``, or a tensor's values, waits for it.

    Attributes:
        gram: float64 tensor of shape (k, k); NaN where the launch needed none.
        coefficients: float64 tensor of shape (k,), of the k gradient lists, before rho and other scales.
    """

    __slots__ = ("_coefficients", "_finite", "_flag", "_gram")

    def __init__(
        self, finite: bool | Tensor, gram: Tensor | Sequence[float], coefficients: Tensor | Sequence[float]
    ) -> None:
        self._finite = self._flag = finite
        self._gram = gram
        self._coefficients = coefficients

    @property
    def finite(self) -> bool:
        """False if the Gram matrix held a NaN or an infinity, and the launch changed no weight because of it."""
        if isinstance(self._finite, Tensor):
            self._finite = bool(self._finite)
        return self._finite

    def unread(self) -> LaunchReport:
        """The same, with nothing known yet of what lies on a GPU: for a launch that a CUDA graph makes again."""
        return LaunchReport(self._flag, self._gram, self._coefficients)

    @property
    def overflow(self) -> bool | Tensor:
        """The opposite of ``finite`` without waiting for a GPU, as operations take it for ``found_inf``."""
        return self._flag == 0.0 if isinstance(self._flag, Tensor) else not self._flag

    @property
    def is_known(self) -> bool:
        """Whether ``finite`` can be read without waiting for a GPU."""
        return not isinstance(self._finite, Tensor) or self._finite.device.type == "cpu"

    @property
    def coefficients(self) -> Tensor:
        return float64(self._coefficients)

    @property
    def gram(self) -> Tensor:
        gram = float64(self._gram)
        count = len(self._coefficients)
        return gram if gram.dim() == 2 else gram.reshape(-1)[: count * count].reshape(count, count)

    @property
    def norms(self) -> Tensor:
        """Norms of the gradient lists in the launch's geometry, float64, shape (k,)."""
        return self.gram.diagonal().sqrt()

    def __repr__(self) -> str:
        return f"LaunchReport(finite={self.finite}, norms={self.norms.tolist()})"
