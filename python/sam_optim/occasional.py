"""SAM in some of the steps, and the base optimizer in the others: who wants most of SAM for less than two gradients."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from .construction import BaseOptimizer
from .errors import InvalidSettingError
from .optimizer import ClosureRuns
from .passes import Gradients, Pass, Passes, Update
from .sam import SAM
from .settings import Adaptive, as_whole, check_number, handed_on, whole_number


class _OccasionalSAM(SAM):
    """Steps with one pass, and steps with two: driven by ``each_pass()``, closures or ``TrainStep``, to save passes."""

    def _is_plain_step(self) -> bool:
        return super()._is_plain_step() or not self.last_step.ascent


class _ScheduledSAM(_OccasionalSAM):
    """Of which a step's number tells what it is. Steps are counted in each group's ``occasional_step``."""

    takes_scaled_gradients = True
    is_capturable = False
    perturbs_micro_batches = False
    _more_settings: dict[str, Any] = {"occasional_step": 0}  # noqa: RUF012

    @property
    def step_number(self) -> int:
        """Of the step under way, or of the next; from 0."""
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


class IntervalSAM(_ScheduledSAM):
    """SAM in every k-th step from a given one on; the steps between are the base optimizer's, bit for bit.

    Args:
        every: SAM's share of the steps is one in so many; at least 1.
        start: number of the first step that may be SAM's, counted from 0; or, with ``total_steps``, a share of them, a
            float from 0 to below 1. SAM late in training alone does nearly as well as SAM throughout in some settings
            (Zhou et al. 2024, arXiv 2410.10373).
        total_steps: of the whole training. ``start=0.8, total_steps=10_000`` is ``start=8_000``.
        all others: as for :class:`SAM`.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        every: int = 2,
        start: float = 0,
        total_steps: int | None = None,
        *,
        adaptive: Adaptive = False,
        eta: float | None = None,
        perturb_eps: float = NORM_EPSILON,
        closure_runs: ClosureRuns = "every_pass",
        backend: str | None = None,
        master_weights: bool = False,
        process_group: Any = None,
        counts_in_norm: Callable[[Tensor], bool] | None = None,
        **base_kwargs: Any,
    ) -> None:
        self.every = whole_number("every", every, 1)
        self.start = _first_step(start, total_steps)
        super().__init__(params, base_optimizer, rho, **handed_on(locals()))

    def is_sharpness_aware(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0


def _first_step(start: float, total_steps: int | None) -> int:
    """The number of a step, of which ``start`` may be the share of all."""
    number = as_whole(start)
    if total_steps is None:
        if number is None:
            raise InvalidSettingError(
                f"Invalid start: {start!r}; it is a step's number. For a share of the training give total_steps as well"
            )
        return whole_number("start", start, 0)
    total_steps = whole_number("total_steps", total_steps, 1)
    if number is None:
        check_number("start", start, 0, 1, open_end=True)
        number = round(float(start) * total_steps)
    if number >= total_steps:
        raise InvalidSettingError(f"Invalid start: {start}; of {total_steps} steps none would be SAM's")
    return whole_number("start", number, 0)


class RandomizedSAM(_ScheduledSAM):
    """SAM in steps that a coin chooses (Zhao et al. 2022, arXiv 2203.09962, RST with its weight at 1).

    The coin depends on seed and step alone, so all ranks toss alike and a resumed run goes on as it would have.

    Args:
        probability: of a step to be SAM's, from 0 to 1; a tensor or a number that a schedule may change,
            ``optimizer.probability``.
        seed: of the coin.
        all others: as for :class:`SAM`.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        probability: float = 0.5,
        seed: int = 0,
        *,
        adaptive: Adaptive = False,
        eta: float | None = None,
        perturb_eps: float = NORM_EPSILON,
        closure_runs: ClosureRuns = "every_pass",
        backend: str | None = None,
        master_weights: bool = False,
        process_group: Any = None,
        counts_in_norm: Callable[[Tensor], bool] | None = None,
        **base_kwargs: Any,
    ) -> None:
        check_number("probability", probability, 0, 1)
        self.probability, self.seed = probability, whole_number("seed", seed)
        super().__init__(params, base_optimizer, rho, **handed_on(locals()))

    def is_sharpness_aware(self, step: int) -> bool:
        # Seeds that differ in little give generators whose first numbers are alike.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63
        coin = torch.Generator("cpu").manual_seed(mixed)
        return torch.rand((), generator=coin, dtype=torch.float32, device="cpu").item() < self.probability


class AESAM(_OccasionalSAM):
    """SAM where the gradient is large (Jiang et al. 2023, arXiv 2304.14647, AE-SAM).

    ::

        mean     <- decay mean + (1 - decay) |g|^2
        variance <- decay variance + (1 - decay) (|g|^2 - mean)^2
        SAM if |g|^2 >= mean + c sqrt(variance), else the base optimizer with g

    Mean and variance are in the first group, ``aesam_mean`` and ``aesam_variance``, and part of ``state_dict()``. Their
    start is our reading: the mean begins at the first gradient's square, the variance at zero, so the first step is
    SAM's. The decision waits for the GPU.

    Args:
        c: how far above the mean; the authors let it fall from 1 to -1 over training: set ``optimizer.c``.
        decay: of the averages, from 0 to below 1.
        all others: as for :class:`SAM`.

    GradScaler is refused: squared norms of different scales cannot be compared. So are trainers that call ``step()``
    by themselves, and ``first_step()`` with ``second_step()``: whether a pass is the last is known only after it.
    """

    takes_scaled_gradients = False
    is_capturable = False
    perturbs_micro_batches = False
    _scaling_obstacle = "it compares norms of gradients over steps, whose scales differ"
    _more_settings: dict[str, Any] = {"aesam_mean": None, "aesam_variance": 0.0}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        c: float = 0.0,
        decay: float = 0.9,
        *,
        adaptive: Adaptive = False,
        eta: float | None = None,
        perturb_eps: float = NORM_EPSILON,
        closure_runs: ClosureRuns = "every_pass",
        backend: str | None = None,
        master_weights: bool = False,
        process_group: Any = None,
        counts_in_norm: Callable[[Tensor], bool] | None = None,
        **base_kwargs: Any,
    ) -> None:
        check_number("c", c)
        check_number("decay", decay, 0, 1, open_end=True)
        self.c, self.decay = float(c), decay
        super().__init__(params, base_optimizer, rho, **handed_on(locals()))

    def passes(self) -> Passes:
        g = yield Pass()
        if self._is_large(g):
            self.ascend(g, rule=self._rule, scale=self._radii())
            g = yield Pass(perturbed=True, last=True)
        yield Update(g)

    def _is_large(self, g: Gradients) -> bool:
        squared = float(self.gram(g)[0, 0])
        if not math.isfinite(squared):
            return False
        mean, variance = self.param_groups[0]["aesam_mean"], self.param_groups[0]["aesam_variance"]
        if mean is None:
            mean = squared
        else:
            mean = self.decay * mean + (1.0 - self.decay) * squared
            variance = self.decay * variance + (1.0 - self.decay) * (squared - mean) ** 2
        for own in self.param_groups:
            own["aesam_mean"], own["aesam_variance"] = mean, variance
        return bool(squared >= mean + self.c * variance**0.5)
