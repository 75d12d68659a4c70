"""An optimizer's groups: those of its base optimizer, with the settings that the method adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checks import check_group_keys
from .construction import defaults_of, puts_into_groups
from .errors import InvalidSettingError
from .kept import PREFIX
from .settings import METHOD

if TYPE_CHECKING:
    from .optimizer import SharpnessAwareOptimizer


def add(optimizer: SharpnessAwareOptimizer, group: dict[str, Any]) -> None:
    """Adds a group to the base optimizer. If it is refused, by the base or here, nothing changes."""
    base = optimizer._base
    if not isinstance(group, dict):
        base.add_param_group(group)  # torch says what it wants
        return
    check_keys(optimizer, group)
    # What is the base's and was not changed here is left to the base.
    given, defaults = optimizer._given_defaults, defaults_now(optimizer)
    changed = {key: value for key, value in defaults.items() if key not in given or given[key] is not value}
    left = optimizer._left_by_others(group)
    own = {**changed, **{key: value for key, value in group.items() if key not in left}}
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
    """Gives groups that were added to the base optimizer its defaults and those of this method."""
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
        complete(optimizer, group, defaults_now(optimizer))
    optimizer._plans.known_groups = list(groups)


def complete(
    optimizer: SharpnessAwareOptimizer, group: dict[str, Any], defaults: dict[str, Any], *, is_first: bool = False
) -> None:
    """Gives one group the settings that it lacks.

    Args:
        is_first: called by the constructor, whose settings replace those that another optimizer has left.
    """
    if not isinstance(group, dict):
        raise TypeError(f"a parameter group is a dict, got {group!r}")
    check_keys(optimizer, group)
    for key in optimizer._left_by_others(group, also_own=is_first):
        group.pop(key, None)
    for key, value in defaults.items():
        group.setdefault(key, value)
    optimizer.validate_group(group)


def defaults_now(optimizer: SharpnessAwareOptimizer) -> dict[str, Any]:
    """``defaults``, with the present value of settings that must be the same in all groups."""
    groups = optimizer._base.param_groups
    first = groups[0] if groups else {}
    keys = [optimizer._keys[name] for name, setting in optimizer._declared.items() if not setting.per_group]
    return {**optimizer.defaults, **{key: first[key] for key in keys if key in first}}


def check_keys(optimizer: SharpnessAwareOptimizer, group: dict[str, Any]) -> None:
    """Raises :class:`InvalidSettingError` for a key that would have no effect."""
    if group.get(METHOD, optimizer._method) != optimizer._method:  # another method's settings may be there still
        return
    kept = optimizer._kept_in_groups
    of_groups = [name for name in optimizer._method_defaults if name not in (METHOD, *kept)]
    of_groups += ["perturb"] if "perturb" not in of_groups else []

    def is_bases(key: str) -> bool:
        return is_of_base(optimizer, key)

    method, of_base = type(optimizer), {*defaults_of(optimizer._base), *kept, METHOD}
    check_group_keys(group, method, of_groups, of_base, is_bases, optimizer._fixed)
    for key in group if METHOD not in group else ():
        if isinstance(key, str) and key.startswith(PREFIX) and key not in of_groups:
            raise InvalidSettingError(f"{key} has no effect in a group: see group_key() of {method.__name__}")


def is_of_base(optimizer: SharpnessAwareOptimizer, key: str) -> bool:
    """Whether a key of a group is the base's."""
    return key in defaults_of(optimizer._base) or puts_into_groups(optimizer._base, key)
