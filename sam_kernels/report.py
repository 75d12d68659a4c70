"""What a launch found out: its Gram matrix, coefficients, and whether they were finite."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .scales import float64


class LaunchReport:
    """Scalars of one ascent or descent.

    Those of a launch on a GPU stay there until they are read: reading ``finite``, or a tensor's values, waits for it.
    A launch that needed no Gram matrix has looked at no norm, and its report says nothing of them.

    Attributes:
        gram: float64 tensor of shape (k, k), of the k gradient lists as they were given (scaled, where GradScaler has
            scaled them) in the launch's geometry; None where the launch needed none.
        coefficients: float64 tensor of shape (k,), of the k gradient lists, before rho and other scales.
    """

    __slots__ = ("_coefficients", "_finite", "_flag", "_grad_scale", "_gram")

    def __init__(
        self,
        finite: bool | Tensor | None,
        gram: Tensor | Sequence[float] | None,
        coefficients: Tensor | Sequence[float],
        grad_scale: Tensor | float | None = None,
    ) -> None:
        self._finite = self._flag = finite
        self._gram = gram
        self._coefficients = coefficients
        self._grad_scale = grad_scale

    @classmethod
    def without_gram(cls, count: int) -> LaunchReport:
        """Of a launch that took the sum of so many lists and looked at none of their numbers."""
        return cls(None, None, [1.0] * count)

    @property
    def finite(self) -> bool | None:
        """False if the Gram matrix held a NaN or an infinity, and the launch changed no weight because of it.

        None if there was no Gram matrix: then nobody has looked, and the launch has used whatever was there.
        """
        if isinstance(self._finite, Tensor):
            self._finite = bool(self._finite)
        return self._finite

    def unread(self) -> LaunchReport:
        """The same, with nothing known yet of what lies on a GPU: for a launch that a CUDA graph makes again."""
        return LaunchReport(self._flag, self._gram, self._coefficients, self._grad_scale)

    def unscaled(self, grad_scale: Tensor | float) -> LaunchReport:
        """The same, with the norms of the gradients before they were multiplied by ``grad_scale`` (one element)."""
        return LaunchReport(self._flag, self._gram, self._coefficients, grad_scale)

    @property
    def overflow(self) -> bool | Tensor:
        """Whether ``finite`` is False, without waiting for a GPU, as operations take it for ``found_inf``."""
        return self._flag == 0.0 if isinstance(self._flag, Tensor) else self._flag is False

    @property
    def is_known(self) -> bool:
        """Whether ``finite`` can be read without waiting for a GPU."""
        return not isinstance(self._finite, Tensor) or self._finite.device.type == "cpu"

    @property
    def coefficients(self) -> Tensor:
        return float64(self._coefficients)

    @property
    def gram(self) -> Tensor | None:
        if self._gram is None:
            return None
        gram = float64(self._gram)
        count = len(self._coefficients)
        return gram if gram.dim() == 2 else gram.reshape(-1)[: count * count].reshape(count, count)

    @property
    def norms(self) -> Tensor | None:
        """Norms of the gradient lists, float64, shape (k,); None where there was no Gram matrix.

        They are the launch's own: in its geometry, |T x|, which with T = 1 is |x| and with ASAM is not, and over the
        tensors that took part in it. Multiplied by GradScaler's scale as the lists were, unless that was known:
        :meth:`unscaled`.
        """
        gram = self.gram
        if gram is None:
            return None
        norms = gram.diagonal().sqrt()
        return norms if self._grad_scale is None else norms / float64([self._grad_scale]).to(norms.device)

    def __repr__(self) -> str:
        norms = self.norms
        if norms is None:
            return "LaunchReport(needed no norms, so whether the gradients were finite is not known)"
        return f"LaunchReport(finite={self.finite}, norms={norms.tolist()})"
