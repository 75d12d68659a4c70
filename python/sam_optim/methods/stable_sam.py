"""Stable SAM."""

from __future__ import annotations

from sam_kernels.rules import NormMatched

from ..core.passes import Pass, Passes, Update
from .sam import SAM


class StableSAM(SAM):
    """Stable SAM (Tan et al. 2024, arXiv 2401.07250): w <- base_optimizer(w, g+ abs(g) / abs(g+)).

    The update's gradient has the length of the gradient at w.

    Args:
        all others: as for :class:`SAM`.
    """

    takes_scaled_gradients = True
    is_capturable = True
    plain_steps_take_one_pass = True
    perturbs_micro_batches = True

    def passes(self) -> Passes:
        g = yield Pass(kept=True)
        self.ascend(g, rule=self._rule, scale=self.radii())
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus, g, rule=NormMatched())
