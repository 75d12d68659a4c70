"""Schedules for rho, in the manner of torch.optim.lr_scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from .errors import InvalidSettingError


class LambdaRho:
    """Sets each group's rho to its initial value times a function of the step count, as LambdaLR does for lr.

    Args:
        optimizer: its groups must have ``rho``.
        rho_lambda: from the number of :meth:`step` calls so far to a factor; or one for each group.
    """

    def __init__(self, optimizer: Optimizer, rho_lambda: Callable[[int], float] | Sequence[Callable[[int], float]]):
        self.optimizer = optimizer
        groups = optimizer.param_groups
        self.rho_lambdas = [rho_lambda] * len(groups) if callable(rho_lambda) else list(rho_lambda)
        if len(self.rho_lambdas) != len(groups):
            raise InvalidSettingError(f"{len(self.rho_lambdas)} functions for {len(groups)} groups")
        for group in groups:
            group.setdefault("initial_rho", group["rho"])
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
        for group, factor in zip(self.optimizer.param_groups, self.rho_lambdas, strict=True):
            group["rho"] = group["initial_rho"] * factor(self.step_count)


class RhoFollowsLR:
    """Lets rho follow the learning rate linearly (GSAM, Zhuang et al. 2022, arXiv 2203.08065, section 4.1).

    rho = rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min). Call :meth:`step` after the learning rate's
    scheduler. A group whose lr leaves [lr_min, lr_max], as in warm-up, gets the nearer end.

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
        self.lr_max = [_largest_lr(group) if lr_max is None else lr_max for group in optimizer.param_groups]
        if any(largest <= lr_min for largest in self.lr_max):
            raise InvalidSettingError(f"Invalid lr_max: {self.lr_max}; it must be larger than lr_min = {lr_min}")
        for group in optimizer.param_groups:
            group.setdefault("initial_rho", group["rho"])
        self.step()

    def step(self) -> None:
        """Sets each group's rho from its present learning rate."""
        for group, lr_max in zip(self.optimizer.param_groups, self.lr_max, strict=True):
            share = (float(group["lr"]) - self.lr_min) / (lr_max - self.lr_min)
            largest = group["initial_rho"]
            group["rho"] = largest if share >= 1.0 else self.rho_min + (largest - self.rho_min) * max(share, 0.0)


def _largest_lr(group: dict[str, Any]) -> float:
    """Of those that a group knows of."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
