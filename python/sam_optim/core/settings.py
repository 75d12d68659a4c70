"""Settings of methods: declared in the class, kept in the groups, where checkpoints and schedules find them."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, overload

from torch import Tensor

from sam_kernels.host import same_objects

from .checks import check_choice, check_number, radius, whole_number
from .errors import InvalidSettingError
from .kept import PREFIX

Adaptive = bool | Literal["elementwise", "weights"]
T = TypeVar("T")
Group = dict[str, Any]

# Keywords that all methods have: SAM's, and those of every optimizer here.
SHARED = (
    "adaptive",
    "eta",
    "perturb_eps",
    "closure_runs",
    "backend",
    "master_weights",
    "process_group",
    "counts_in_norm",
)

# Keys that mean the same in the groups of all SAM classes, whoever has written them.
EVERYWHERE = frozenset({"rho", "rho_val", "adaptive", "eta", "perturb"})

# Where a group says whose settings it holds: the same name may mean something else to another method.
METHOD = PREFIX + "method"

_REQUIRED: Any = object()


def handed_on(given: dict[str, Any], leave_out: str = "") -> dict[str, Any]:
    """The arguments of a method's constructor, in the form that the constructor of its parent class takes.

    Constructors name every setting, for type checkers and for readers of the signature.

    Args:
        given: the constructor's ``locals()``.
        leave_out: an argument that it has dealt with itself.
    """
    kept = {name: value for name, value in given.items() if name not in ("self", "__class__", "base_kwargs", leave_out)}
    return {**kept, **given["base_kwargs"]}


# ---------------------------------------------------------------------- declarations


class Setting(Generic[T]):
    """A setting of a method, declared in the body of its class; its value is a key of the groups.

    ::

        class GSAM(SAM):
            alpha = Number(at_least=0)

    ``optimizer.alpha`` is the value that all groups have; assigning to it sets all of them, and ``defaults``.

    Args:
        per_group: whether groups may have different values.
        default: the value if the constructor does not name it.
        of_groups_only: no constructor takes it.

    Raises:
        InvalidSettingError: if it is read although the groups differ, or if an invalid value is assigned.
    """

    def __init__(self, *, per_group: bool = False, default: Any = _REQUIRED, of_groups_only: bool = False) -> None:
        self.name = ""
        self.per_group, self.default, self.of_groups_only = per_group, default, of_groups_only

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def checked(self, value: Any) -> T:
        """The value as a method uses it.

        Raises:
            InvalidSettingError: if it is none.
        """
        raise NotImplementedError

    @overload
    def __get__(self, optimizer: None, owner: type) -> Self: ...

    @overload
    def __get__(self, optimizer: Any, owner: type) -> T: ...

    def __get__(self, optimizer: Any, owner: type) -> Self | T:
        if optimizer is None:
            return self
        own = vars(optimizer)
        if "_keys" not in own:
            if self.name not in own:
                raise AttributeError(self.name)
            value: T = own[self.name]
            return value
        key, groups = own["_keys"][self.name], optimizer.param_groups
        try:
            return self._of_all(groups, key)
        except LookupError:  # a group was added to the base, and has not got its settings yet
            return self._of_all([group for group in groups if key in group] or [optimizer.defaults], key)

    def _of_all(self, groups: list[Group], key: str) -> T:
        first = groups[0][key]
        if len(groups) > 1 and not all(_equal(group[key], first) for group in groups):
            raise InvalidSettingError(self._difference(groups, key))
        return self.checked(first)

    def __set__(self, optimizer: Any, value: T | Tensor) -> None:
        own = vars(optimizer)
        if "_keys" not in own:  # a class of somebody's own, before this package's constructor is called
            own[self.name] = value
            return
        key, checked = own["_keys"][self.name], self.checked(value)
        for holder in (*optimizer.param_groups, optimizer.defaults):
            holder[key] = checked

    def refuse_differences(self, groups: list[Group], key: str) -> None:
        """Raises :class:`InvalidSettingError` unless all groups have the same value, or may differ."""
        if not self.per_group and not all(_equal(group[key], groups[0][key]) for group in groups):
            raise InvalidSettingError(self._difference(groups, key))

    def _difference(self, groups: list[Group], key: str) -> str:
        values = ", ".join(repr(group[key]) for group in groups)
        if self.per_group:
            return f"{self.name} differs between the groups: {values}. Read it there, param_groups[...][{key!r}]"
        return f"Invalid {self.name}: {values}; it must be the same in all groups"


class Number(Setting[float]):
    """A finite number within a range, see :func:`check_number`. A tensor stays one, and can be written to."""

    def __init__(
        self,
        at_least: float | None = None,
        at_most: float | None = None,
        *,
        above: float | None = None,
        below: float | None = None,
        **how: Any,
    ) -> None:
        super().__init__(**how)
        self._range: dict[str, Any] = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
        largest = sys.float_info.max
        self._low = -largest if at_least is None else float(at_least)
        self._low = self._low if above is None else math.nextafter(above, math.inf)
        self._high = largest if at_most is None else float(at_most)
        self._high = self._high if below is None else math.nextafter(below, -math.inf)

    def checked(self, value: Any) -> float:
        if type(value) is float and self._low <= value <= self._high:
            return value
        check_number(self.name, value, **self._range)
        return value if isinstance(value, Tensor) else float(value)  # type: ignore[return-value]


class Radius(Setting[float | Tensor]):
    """A finite number of at least 0. It is checked where it is used; the value of a tensor on a GPU never is."""

    def __init__(self, **how: Any) -> None:
        super().__init__(per_group=True, **how)

    def checked(self, value: Any) -> float | Tensor:
        return radius(value, self.name)


class Whole(Setting[int]):
    """A whole number."""

    def __init__(self, at_least: int | None = None, **how: Any) -> None:
        super().__init__(**how)
        self._at_least = at_least

    def checked(self, value: Any) -> int:
        return whole_number(self.name, value, self._at_least)


class Choice(Setting[T]):
    """One of several values."""

    def __init__(self, *choices: T, **how: Any) -> None:
        super().__init__(**how)
        self._choices = choices

    def checked(self, value: Any) -> T:
        check_choice(self.name, value, self._choices)
        chosen: T = value
        return chosen


class Maybe(Setting[T | None]):
    """Another setting, or None."""

    def __init__(self, setting: Setting[T]) -> None:
        super().__init__(per_group=setting.per_group, default=setting.default)
        self._setting = setting

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = self._setting.name = name

    def checked(self, value: Any) -> T | None:
        return None if value is None else self._setting.checked(value)


class Fixed(Setting[T]):
    """A setting of the parent class that has one fixed value here. Groups do not hold it."""

    def __init__(self, value: T) -> None:
        super().__init__()
        self.value = value

    @overload
    def __get__(self, optimizer: None, owner: type) -> Self: ...

    @overload
    def __get__(self, optimizer: Any, owner: type) -> T: ...

    def __get__(self, optimizer: Any, owner: type) -> Self | T:
        return self if optimizer is None else self.value

    def __set__(self, optimizer: Any, value: T | Tensor) -> None:
        raise InvalidSettingError(f"Invalid {self.name}: {value!r}; with {type(optimizer).__name__} it is {self.value}")


def _equal(a: Any, b: Any) -> bool:
    """Whether two values of a setting are the same; waits for a GPU if necessary."""
    if a is b:
        return True
    try:
        return float(a) == float(b) if isinstance(a, Tensor) or isinstance(b, Tensor) else bool(a == b)
    except (TypeError, ValueError, RuntimeError):
        return False


# ---------------------------------------------------------------------- in the groups


class SettingsInGroups:
    """The settings of an optimizer's class, in its groups.

    Attributes:
        param_groups: the groups.
        defaults: the values for new groups.
    """

    param_groups: Any
    defaults: Any

    _declared: ClassVar[dict[str, Setting[Any]]] = {}
    _fixed: ClassVar[dict[str, Any]] = {}
    _method: ClassVar[str | None] = None  # the name of the class whose settings these are: the last that declares any

    # What else a method keeps in the groups, with initial values.
    _kept_in_groups: Mapping[str, Any] = MappingProxyType({})

    _keys: dict[str, str]  # of the groups, by the settings' names
    _watched: list[str]  # those of them that are looked at when a step begins
    _looked_at: list[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._declared, cls._fixed = {}, {}
        for owner in reversed(cls.__mro__):
            own = {name: value for name, value in vars(owner).items() if isinstance(value, Setting)}
            for name, value in own.items():
                if isinstance(value, Fixed):
                    cls._declared.pop(name, None)
                    cls._fixed[name] = value.value
                else:
                    cls._declared[name] = value
            cls._method = owner.__name__ if own else cls._method

    @classmethod
    def setting_names(cls) -> list[str]:
        """The names of the settings that a method keeps in its groups and that its constructor takes.

        As long as the base optimizer has none of these keys itself, ``{name: group[name] for name in
        METHOD.setting_names()}`` are the settings of a group; see :meth:`group_key`.
        """
        return [name for name, setting in cls._declared.items() if not setting.of_groups_only]

    def settings(self) -> dict[str, Any]:
        """The settings by name. ``METHOD(params, base_optimizer, **settings, lr=...)`` makes an equal method.

        Raises:
            InvalidSettingError: if the groups differ.
        """
        return {name: getattr(self, name) for name in self.setting_names()}

    def group_key(self, setting: str) -> str:
        """The key under which the groups hold a setting: its name, or ``sam_optim_`` and its name.

        The latter if the base optimizer has a setting of that name itself, as RMSprop has an ``alpha``. Then the key
        ``alpha`` is RMSprop's, and GSAM's is ``sam_optim_alpha``.

        Raises:
            KeyError: if the method has no such setting.
        """
        return self._keys[setting]

    def per_group(self, *settings: str) -> list[list[Any]]:
        """The present values of some settings, for each group.

        Raises:
            InvalidSettingError: for a value out of range.
        """
        chosen = [(self._declared[name], self._keys[name]) for name in settings]
        return [[setting.checked(group[key]) for setting, key in chosen] for group in self.param_groups]

    def validate_group(self, group: Group) -> None:
        """Raises :class:`InvalidSettingError` if a group's settings are out of range.

        It is called for a new group, and for all groups when a step begins after somebody has changed a setting. For
        methods that declare no settings it checks ``rho``. Derived classes may extend it.
        """
        for name, setting in self._declared.items():
            setting.checked(group[self._keys[name]])
        if "rho" in group and "rho" not in self._declared:
            radius(group["rho"])

    def _check_settings(self) -> None:
        """Checks the settings if one of them is another object than when the last step began."""
        if not self._watched:
            return
        groups = self.param_groups
        values = [group[key] for key in self._watched for group in groups]
        if same_objects(values, self._looked_at):
            return
        for group in groups:
            self.validate_group(group)
        self._refuse_differences()
        # A tensor can be written into, and have another value next time.
        self._looked_at[:] = [] if any(isinstance(value, Tensor) for value in values) else values

    def _refuse_differences(self) -> None:
        for name, setting in self._declared.items():
            setting.refuse_differences(self.param_groups, self._keys[name])

    def _taken(self, given: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        """Takes declared settings out of a constructor's keywords, or else out of a dict of defaults.

        Raises:
            InvalidSettingError: for a value out of range. Those that groups had before there were declarations are
                looked at in the groups, of which each may have its own.
            TypeError: if one is missing.
        """
        taken = {}
        for name, setting in self._declared.items():
            value = setting.default
            if name in more:
                value = more.pop(name)
            if name in given and not setting.of_groups_only:
                value = given.pop(name)
            if value is _REQUIRED:
                raise TypeError(f"{type(self).__name__} is missing its setting {name}")
            taken[name] = value if name in EVERYWHERE else setting.checked(value)
        return taken

    def _named(self, taken: Mapping[str, Any], of_base: Collection[str]) -> dict[str, Any]:
        """Settings under the keys that groups hold them by.

        Args:
            of_base: names that are the base optimizer's.
        """
        self._keys = {name: PREFIX + name if name in of_base else name for name in self._declared}
        # The others are checked where they are used: radii, and geometry when the kernels' plan is made anew.
        self._watched = [key for name, key in self._keys.items() if name not in EVERYWHERE]
        if self._watched == ["perturb_eps"]:  # which is, too, before anything has changed
            self._watched = []
        self._looked_at = []
        named = {self._keys[name]: value for name, value in taken.items()}
        return {**named, METHOD: self._method} if named else {}

    def _shared_with(self, method: Any) -> Collection[str]:
        """The settings that this method shares with another one, from which it is derived."""
        for cls in type(self).__mro__:
            if cls.__name__ == method and issubclass(cls, SettingsInGroups):
                return cls._declared.keys() & self._declared.keys()
        return ()

    def _left_by_others(self, group: Group, *, also_own: bool = False) -> set[str]:
        """The keys in a group that another method has left there and for which this method has a setting.

        Args:
            also_own: also those of an optimizer of the same method.
        """
        if METHOD not in group:
            return set()
        shared = () if also_own else self._shared_with(group[METHOD])
        return {METHOD, *(key for name, key in self._keys.items() if name not in EVERYWHERE and name not in shared)}

    def _with_loaded_settings(self, saved: Mapping[str, Any], own: Group) -> Group:
        """A group of a state dict, with its own settings if they are this method's, otherwise with those of ``own``.

        It may have been saved with a base optimizer that had other keys than this one.
        """
        group, shared = dict(saved), self._shared_with(saved.get(METHOD))
        for name, key in self._keys.items():
            if name in EVERYWHERE:
                continue
            value, renamed = own[key], PREFIX + name
            if renamed in saved:
                found = group.pop(renamed)
                value = found if name in shared else value
            elif name in shared and name in saved:
                value = group.pop(name)
                if key != name and name in own:
                    group[name] = own[name]  # the base's
            group[key] = value
        if METHOD in own:
            group[METHOD] = own[METHOD]
        return group
