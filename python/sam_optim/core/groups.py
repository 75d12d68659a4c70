"""An optimizer's groups: those of its base optimizer, with the settings that its method adds to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .construction import defaults_of, puts_into_groups
from .errors import InvalidSettingError
from .settings import check_group_keys

if TYPE_CHECKING:
    from .optimizer import SharpnessAwareOptimizer


def add(optimizer: SharpnessAwareOptimizer, group: dict[str, Any]) -> None:
    """Adds a group to the base optimizer; what is refused, by the base too, changes nothing."""
    base = optimizer._base
    if not isinstance(group, dict):
        base.add_param_group(group)  # torch says what it wants
        return
    check_keys(optimizer, group)
    # What is the base's and was not changed here is left to the base.
    given = optimizer._given_defaults
    changed = {key: value for key, value in optimizer.defaults.items() if key not in given or given[key] is not value}
    own = {**changed, **group}
    count, known = len(base.param_groups), set(base.state)
    base.add_param_group(own)
    try:
        for added in base.param_groups[count:]:
            optimizer.validate_group(added)
    except BaseException:
        del base.param_groups[count:]
        for param in set(base.state) - known:
            del base.state[param]
        raise
    if len(base.param_groups) > count and base.param_groups[-1] is own:
        # torch completes the dict that it is given, and keeps it.
        group.update(own)
        base.param_groups[-1] = group


def complete_all(optimizer: SharpnessAwareOptimizer) -> None:
    """Groups that somebody has added to the base optimizer get its defaults and this method's."""
    known = optimizer._plans.known_groups
    if known:
        optimizer.stepper.refuse_mid_step("param_groups were changed")
    groups = optimizer._base.param_groups
    for group in groups:
        if any(group is other for other in known):
            continue
        if not isinstance(group, dict) or "params" not in group:
            raise InvalidSettingError(f"Invalid entry of param_groups: {group!r}; it must be a dict with 'params'")
        params = group["params"]
        if not isinstance(params, list):
            group["params"] = [params] if isinstance(params, Tensor) else list(params)
        complete(optimizer, group, optimizer.defaults)
    optimizer._plans.known_groups = list(groups)


def complete(optimizer: SharpnessAwareOptimizer, group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Gives one group the settings that it lacks."""
    if not isinstance(group, dict):
        raise TypeError(f"a parameter group is a dict, got {group!r}")
    check_keys(optimizer, group)
    for key, value in defaults.items():
        group.setdefault(key, value)
    optimizer.validate_group(group)


def check_keys(optimizer: SharpnessAwareOptimizer, group: dict[str, Any]) -> None:
    """Raises :class:`InvalidSettingError` for a key that would do nothing."""
    defaults = optimizer._method_defaults
    of_groups = [*defaults, *({"perturb"} - defaults.keys())]

    def is_bases(key: str) -> bool:
        return is_of_base(optimizer, key)

    check_group_keys(group, type(optimizer), of_groups, defaults_of(optimizer._base), is_bases)


def is_of_base(optimizer: SharpnessAwareOptimizer, key: str) -> bool:
    """Whether a key of a group is the base's."""
    return key in defaults_of(optimizer._base) or puts_into_groups(optimizer._base, key)
