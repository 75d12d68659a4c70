"""An optimizer's groups and state: those of its base optimizer, with what a method adds to them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .base_update import BaseUpdate
from .errors import StepOrderError
from .moves import Moves, StepReport
from .planning import PlanCache

# Where state dicts have the masters.
_MASTERS = "master_weights"


class GroupsAndState(Moves, Optimizer):
    """What is kept from step to step, and where: groups and state in the base optimizer, the rest in a container.

    Attributes:
        base_optimizer: the base.
        master_weights: whether weights in bfloat16 and float16 have float32 masters.
        process_group: of the ranks that hold other parameters of the same model; None if there are none.
        counts_in_norm: whether this rank counts a parameter in sums over them; None for all.
    """

    base_optimizer: Optimizer
    master_weights: bool
    process_group: Any
    counts_in_norm: Callable[[Tensor], bool] | None
    _method_defaults: dict[str, Any]

    @property
    @abstractmethod
    def is_step_begun(self) -> bool:
        """Whether a step is under way."""

    def validate_group(self, group: dict[str, Any]) -> None:
        """Raises :class:`InvalidSettingError` if a group's settings are out of range."""

    def geometry_of(self, group: dict[str, Any]) -> Sequence[float | None]:
        """For each parameter of a group None for T = 1, or eta for T(w) = |w| + eta."""
        return [None] * len(group["params"])

    def is_perturbed_group(self, group: dict[str, Any]) -> bool:
        """Whether a group takes part in the perturbation and in its norm."""
        return bool(group.get("perturb", True))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's groups, with this method's settings added."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Defaults of the base optimizer and of the method."""
        return {**getattr(self.base_optimizer, "defaults", {}), **self._method_defaults}

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        pass

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, with this method's defaults where it does not say otherwise."""
        self._refuse_mid_step("add_param_group() was called")
        self._complete_group(param_group, self._method_defaults)
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Base and method state, loadable by the plain base optimizer too. The perturbation is never part of it.

        Raises:
            StepOrderError: in the middle of a step, once it has changed anything.
        """
        if not self._is_step_as_if_not_begun():
            self._refuse_mid_step("state_dict() was called")
        state_dict = self._state_dict_of_base()
        method_state = {name: list(v) for name, v in self._container["method state"].items()}
        masters = self._masters()
        if masters is not None:
            method_state[_MASTERS] = masters
        if method_state:
            state_dict["method_state"] = method_state
        return state_dict

    def _state_dict_of_base(self) -> dict[str, Any]:
        """In the form that the base gives its own, with this optimizer's hooks."""
        if type(self.base_optimizer).state_dict is Optimizer.state_dict:
            return super().state_dict()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = dict(self.base_optimizer.state_dict())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def _masters(self) -> list[Tensor | None] | None:
        if not self.master_weights:
            return None
        self._params()
        plans: PlanCache = self._container["plans"]
        if not plans.has_waiting_masters:
            plans.catch_up()
        return plans.masters

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer or of the plain base optimizer.

        Settings of the method that it lacks stay as they are.

        Raises:
            StepOrderError: in the middle of a step.
        """
        self._refuse_mid_step("load_state_dict() was called")
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        method_state = dict(state_dict.pop("method_state", {}))
        saved_groups: list[dict[str, Any]] = state_dict.get("param_groups", [])  # a base may have a form of its own
        if saved_groups:
            own_keys = [*self._method_defaults, "initial_rho"]
            # A different number of groups is left to torch to complain of.
            pairs = zip(saved_groups, self.param_groups, strict=False)
            merged = [{**{k: own[k] for k in own_keys if k in own}, **saved} for saved, own in pairs]
            merged += saved_groups[len(merged) :]
            state_dict["param_groups"] = merged
        self.base_optimizer.load_state_dict(state_dict)
        params = self._params()
        plans: PlanCache = self._container["plans"]
        plans.masters = method_state.pop(_MASTERS, None)
        update: BaseUpdate = self._container["update"]
        if self.master_weights:
            keys = chain.from_iterable(group["params"] for group in saved_groups)
            saved = state_dict["state"]
            update.widen_state({p: saved[k] for k, p in zip(keys, params, strict=True) if k in saved})
        self._container["method state"] = {
            name: [
                None if v is None else v.to(device=p.device, dtype=self._state_dtype(p), copy=True)
                for v, p in zip(entries, params, strict=True)
            ]
            for name, entries in method_state.items()
        }
        self._container["previous closure"] = None
        self._container["loads"] += 1
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_mid_step("the optimizer was copied or pickled")
        dropped = ("_container", "step", "grad_scale", "found_inf", "generators")
        kept = {key: value for key, value in self.__dict__.items() if key not in dropped}
        return {**kept, "method state": self._container["method state"], "masters": self._masters()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        method_state, masters = state.pop("method state"), state.pop("masters")
        super().__setstate__(state)
        self._reset_caches()
        self._container["method state"] = method_state
        plans: PlanCache = self._container["plans"]
        plans.masters = masters

    def _params(self) -> list[Tensor]:
        """All parameters, group by group, as the kernels' plan of this moment holds them."""
        plans: PlanCache = self._container["plans"]
        return plans.update(self.param_groups, self.geometry_of, self.is_perturbed_group).params

    def _complete_group(self, group: dict[str, Any], defaults: dict[str, Any]) -> None:
        for key, value in defaults.items():
            group.setdefault(key, value)
        self.validate_group(group)

    def _reset_caches(self) -> None:
        self._container = {
            "run": None,
            "in step()": False,
            "combining": False,
            "skips combined": False,
            "step call": None,
            "clips each pass": False,
            "step arguments": None,
            "post hooks due": None,
            "side by side": False,
            "in place": False,
            "loads": 0,
            "report": StepReport(),
            "method state": {},
            "previous closure": None,
            "descent handler": None,
            "at end of pass": [],
            "plans": PlanCache(self.master_weights, self.process_group, self.counts_in_norm),
            "update": BaseUpdate(self.base_optimizer, self.master_weights),
        }

    def _is_step_as_if_not_begun(self) -> bool:
        """Whether the step under way still waits for its first gradient, at the weights themselves."""
        run = self._container["run"]
        plans: PlanCache = self._container["plans"]
        return run is not None and run.number == 0 and not plans.holds_copies

    def _refuse_mid_step(self, action: str) -> None:
        if self.is_step_begun:
            raise StepOrderError(
                f"{action} in the middle of a step, while the weights are perturbed; complete it with second_step() or "
                "abandon it with restore() first"
            )
