"""SAM in some of the steps and the base optimizer in the others: most of SAM for less than two gradients."""

from __future__ import annotations

from abc import abstractmethod
from types import MappingProxyType

from ..core.passes import Pass, Passes, Update
from .sam import SAM


class IntermittentSAM(SAM):
    """Has steps with one pass and steps with two; ``each_pass()``, closures and ``TrainStep`` save the passes."""

    def _is_plain_step(self) -> bool:
        return super()._is_plain_step() or not self.last_step.ascent


class ScheduledSAM(IntermittentSAM):
    """Of which a step's number tells what it is. Steps are counted in each group's ``occasional_step``."""

    takes_scaled_gradients = True
    is_capturable = False
    perturbs_micro_batches = False
    _kept_in_groups = MappingProxyType({"occasional_step": 0})

    @property
    def step_number(self) -> int:
        """The number of the step under way, or of the next; from 0."""
        return int(self.param_groups[0]["occasional_step"])

    @abstractmethod
    def is_sharpness_aware(self, step: int) -> bool:
        """Whether the step with this number is one of SAM's."""

    def passes(self) -> Passes:
        if self.is_sharpness_aware(self.step_number):
            yield from super().passes()
        else:
            g = yield Pass(last=True)
            yield Update(g)
        step = self.step_number
        for group in self.param_groups:
            group["occasional_step"] = step + 1
