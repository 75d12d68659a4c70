"""Schedules for rho, in the manner of torch.optim.lr_scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..core.errors import InvalidSettingError


class LambdaRho:
    """Sets each group's rho to its initial value times a function of the step count, as LambdaLR does for lr.

    A rho that is a tensor is written into, for CUDA graphs that read it. Groups that are added later follow the
    function from the next :meth:`step`; where there is one for each group, there has to be one for them as well.

    Args:
        optimizer: its groups must have ``rho``.
        rho_lambda: from the number of :meth:`step` calls so far to a factor; or one for each group.

    Raises:
        InvalidSettingError: for another number of functions than of groups, now or in a step.
    """

    def __init__(self, optimizer: Optimizer, rho_lambda: Callable[[int], float] | Sequence[Callable[[int], float]]):
        self.optimizer = optimizer
        self._rho_lambda = rho_lambda if callable(rho_lambda) else None
        self.rho_lambdas = [] if callable(rho_lambda) else list(rho_lambda)
        self.step_count = 0
        self._apply()

    def step(self) -> None:
        """Goes on to the next step."""
        self.step_count += 1
        self._apply()

    def get_last_rho(self) -> list[float]:
        """Each group's present rho."""
        return [float(group["rho"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"step_count": self.step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step_count = state_dict["step_count"]
        self._apply()

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        if self._rho_lambda is not None:
            self.rho_lambdas = [self._rho_lambda] * len(groups)
        if len(self.rho_lambdas) != len(groups):
            raise InvalidSettingError(
                f"{len(self.rho_lambdas)} functions for {len(groups)} groups: give one for each, or one for all; for a "
                "group that was added later append its own to rho_lambdas"
            )
        pairs = zip(groups, self.rho_lambdas, strict=True)
        _set_all(groups, [_initial_rho(group) * factor(self.step_count) for group, factor in pairs])


class RhoFollowsLR:
    """Lets rho follow the learning rate linearly (GSAM, Zhuang et al. 2022, arXiv 2203.08065, section 4.1).

    rho = rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min). Call :meth:`step` after the learning rate's
    scheduler. A group whose lr leaves [lr_min, lr_max], as in warm-up, gets the nearer end. A rho that is a tensor is
    written into. Of a group that is added later, rho_max and lr_max are those of the next :meth:`step`.

    Args:
        optimizer: its groups must have ``rho``; the group's rho at construction is rho_max.
        lr_max: learning rate at which rho is largest. By default the largest that the group knows of: its present one,
            and what torch's schedulers keep in it, ``initial_lr`` from before a warm-up and ``max_lr`` of OneCycleLR.
            Give it for schedules that begin at another rate than that of the optimizer and rise above it, as CyclicLR
            does, or never reach it, as LambdaLR may.
        rho_min, lr_min: the other end.
    """

    def __init__(
        self, optimizer: Optimizer, lr_max: float | None = None, lr_min: float = 0.0, rho_min: float = 0.0
    ) -> None:
        self.optimizer = optimizer
        self.lr_min, self.rho_min = lr_min, rho_min
        self._given_lr_max = lr_max
        self.lr_max: list[float] = []
        self.step()

    def step(self) -> None:
        """Sets each group's rho from its present learning rate."""
        groups, given = self.optimizer.param_groups, self._given_lr_max
        self.lr_max += [_largest_lr(group) if given is None else given for group in groups[len(self.lr_max) :]]
        if any(largest <= self.lr_min for largest in self.lr_max):
            raise InvalidSettingError(f"Invalid lr_max: {self.lr_max}; it must be larger than lr_min = {self.lr_min}")
        _set_all(groups, [self._rho_of(group, lr_max) for group, lr_max in zip(groups, self.lr_max, strict=False)])

    def _rho_of(self, group: dict[str, Any], lr_max: float) -> Any:
        progress = (float(group["lr"]) - self.lr_min) / (lr_max - self.lr_min)
        largest = _initial_rho(group)
        return largest if progress >= 1.0 else self.rho_min + (largest - self.rho_min) * max(progress, 0.0)


def _initial_rho(group: dict[str, Any]) -> Any:
    """As it was before the first schedule; noted where there was none yet."""
    if "initial_rho" not in group:
        rho = group["rho"]
        group["initial_rho"] = rho.clone() if isinstance(rho, Tensor) else rho
    return group["initial_rho"]


def _set_all(groups: Sequence[dict[str, Any]], values: Sequence[Any]) -> None:
    """As torch's schedulers set lr: a tensor stays the one that a recorded graph reads."""
    written: list[Tensor] = []
    for group, value in zip(groups, values, strict=True):
        rho = group["rho"]
        if not isinstance(rho, Tensor):
            group["rho"] = value
            continue
        if any(rho is other for other in written):  # the default of several groups, which part now
            rho = group["rho"] = rho.clone()
        rho.fill_(value)
        written.append(rho)


def _largest_lr(group: dict[str, Any]) -> float:
    """Of those that a group knows of."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
