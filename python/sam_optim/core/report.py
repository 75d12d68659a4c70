"""What the last step did."""

from __future__ import annotations

from typing import NamedTuple

from sam_kernels import LaunchReport

from .base_update import Outcome


class StepReport(NamedTuple):
    """What the last step did. Its entries are computed, and a GPU is waited for, only when they are read.

    Norms are those that the kernels have taken: |T g| in the geometry of the perturbation, which is |g| except with
    ASAM, over the parameters that are perturbed. Until the update they are norms of gradients scaled as ``p.grad`` was.
    Afterwards they are unscaled, if GradScaler has told its scale (it does not after ``unscale_``).

    Attributes:
        ascent: scalars of the perturbation: norms, coefficients, and ``finite``, False if the gradient was not finite
            and the weights were therefore left unperturbed.
        descent: scalars of the update; None before it. If the update uses the last gradient as it is, as that of SAM,
            nobody looks at its numbers, as in torch's own optimizers. ``finite`` and ``norms`` are then None, and a
            gradient that is not finite makes the weights so. To know, check before the update
            (``clip_grad_norm_(..., error_if_nonfinite=True)``), or use GradScaler.
    """

    ascent: LaunchReport | None = None
    descent: LaunchReport | None = None
    outcome: Outcome | None = None

    @property
    def updated(self) -> bool:
        """Whether the base optimizer's update was made, with a finite gradient or not.

        False after an overflow that GradScaler found, or if the descent needed a Gram matrix and its gradients were
        not finite.
        """
        return self.outcome is not None and self.outcome.updated

    def __repr__(self) -> str:
        return f"StepReport(ascent={self.ascent}, descent={self.descent}, updated={self.updated})"

    def unread(self) -> StepReport:
        """The same, with nothing known yet of what lies on a GPU."""
        ascent = None if self.ascent is None else self.ascent.unread()
        descent = None if self.descent is None else self.descent.unread()
        outcome = None if self.outcome is None else self.outcome._replace(report=self.outcome.report.unread())
        return StepReport(ascent, descent, outcome)
