"""What a method keeps from step to step: a tensor for each parameter, which stays with it if groups change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from sam_kernels import Plan
from sam_kernels.host import same_objects

# Before the names of what is kept, where it stands beside the base optimizer's state.
PREFIX = "sam_optim_"

Lists = dict[str, list[Tensor | None]]


class KeptState:
    """Lists of tensors by name, with an entry for each parameter in the order of the groups.

    The lists are rearranged when the parameters change. An entry of a parameter that is in no group is put aside until
    the parameter comes back, and is freed with it.

    Attributes:
        is_awaited: torch has asked for state before there was any, to load or to save it. Then whatever the method
            may keep has a place in ``state_dict()``.
        stays_in_place: new values must be written over the old ones, as a captured step needs.
    """

    def __init__(self) -> None:
        self.stays_in_place = False
        self.is_awaited = False
        self._params: list[Tensor] = []
        self._sizes: list[int] = []
        self._lists: Lists = {}
        self._aside: dict[str, MutableMapping[Tensor, Tensor]] = {}
        self._plan: Plan | None = None

    @property
    def names(self) -> list[str]:
        """The names of lists in which some parameter has an entry."""
        return [name for name in self._lists if self.has(name)]

    def entries(self, name: str) -> list[Tensor | None]:
        """The list itself, to be written into."""
        entries = self._lists.get(name)
        if entries is None:
            entries = self._lists[name] = [None] * len(self._params)
        return entries

    def has(self, name: str) -> bool:
        """Whether some parameter has an entry."""
        return any(entry is not None for entry in self._lists.get(name, ()))

    def plan_of(self, entries: list[Tensor]) -> Plan:
        """The kernels' view of entries that are written to in every step."""
        if self._plan is None or not same_objects(entries, self._plan.params):
            self._plan = Plan(entries)
        return self._plan

    def forget_others(self, name: str) -> None:
        """Drops entries of this name that were put aside for parameters that are in no group now."""
        self._aside.pop(name, None)

    def replace(self, params: list[Tensor], lists: Lists) -> None:
        """Replaces all lists by others, of these parameters."""
        self.is_awaited = False
        self._params, self._sizes = params, _sizes_of(params)
        self._lists, self._aside, self._plan = lists, {}, None

    def follow(self, params: list[Tensor]) -> None:
        """Moves entries to where their parameters are now.

        Args:
            params: a list that nobody changes later, so that identity says whether it is the same.
        """
        if params is not self._params:
            self._rearrange(params)

    def follow_shapes(self) -> bool:
        """Drops entries of parameters whose shape has changed. Returns whether there were any."""
        if not self._lists or _sizes_of(self._params) == self._sizes:
            return False
        self._rearrange(self._params)
        return True

    def _rearrange(self, params: list[Tensor]) -> None:
        self._plan = None
        before, places = _places_of(self._params), _places_of(params)
        for name, entries in self._lists.items():
            aside = self._aside.setdefault(name, WeakTensorKeyDictionary())
            known = dict(zip(before, entries, strict=True))
            found: list[Tensor | None] = []
            for param, place in zip(params, places, strict=True):
                entry = known.pop(place, None)
                entry = aside.pop(param, None) if entry is None else entry
                found.append(entry if entry is not None and entry.shape == param.shape else None)
            for param, place in zip(self._params, before, strict=True):
                left = known.get(place)
                if left is not None:
                    aside[param] = left
            entries[:] = found
        self._params, self._sizes = params, _sizes_of(params)


def _sizes_of(params: list[Tensor]) -> list[int]:
    try:
        return list(map(Tensor.numel, params))
    except ValueError:  # a lazy module's parameters have no size yet
        return [-1 if is_lazy(param) else param.numel() for param in params]


def _places_of(params: list[Tensor]) -> list[tuple[int, int]]:
    """For each place, the parameter's id, and how many earlier places hold the same parameter."""
    counts: dict[int, int] = {}
    places = []
    for param in params:
        count = counts[id(param)] = counts.get(id(param), -1) + 1
        places.append((id(param), count))
    return places


SetKept = Callable[[Any, str, Tensor | None], None]


class StateOfBoth(MutableMapping[Any, Any]):
    """The base optimizer's state as users and torch see it: each parameter's entries include what the method keeps.

    Entries of the method are not in the base's own dicts, where they would make some bases think that their state is
    complete.

    Args:
        state: the base's.
        beside: what is kept for each parameter, under names with :data:`PREFIX`; None for what does not exist yet.
        set_kept: keeps something; takes parameter, name and value.
        comes: whether the base has state once it has made an update.
    """

    def __init__(
        self,
        state: MutableMapping[Any, Any],
        beside: dict[Tensor, dict[str, Tensor | None]],
        set_kept: SetKept,
        comes: bool,
    ) -> None:
        self._state, self._beside, self._set_kept, self._comes = state, beside, set_kept, comes

    def __getitem__(self, key: Any) -> Any:
        kept = self._beside.get(key)
        if kept is None:
            return self._state[key]
        return Entries.of(key, self._state.get(key, {}), kept, self)

    def __setitem__(self, key: Any, entries: Any) -> None:
        own = [name for name in entries if isinstance(name, str) and name.startswith(PREFIX)]
        self._state[key] = {k: v for k, v in entries.items() if k not in own} if own else entries
        for name in own:
            self.keep(key, name, entries[name])

    def __delitem__(self, key: Any) -> None:
        kept = self._beside.pop(key, None)
        for name in kept or ():
            self._set_kept(key, name, None)
        if kept is None or key in self._state:
            del self._state[key]

    def __contains__(self, key: object) -> bool:
        return key in self._state or key in self._beside

    def get(self, key: Any, default: Any = None) -> Any:
        """As that of a dict. (By index, a base's state may make an entry for whatever it is asked for.)"""
        return self[key] if key in self else default  # noqa: SIM401  is this very method

    def keep(self, key: Any, name: str, value: Tensor | None) -> None:
        """Writes to what the method keeps."""
        self._set_kept(key, name, value)
        self._beside.setdefault(key, {})[name] = value

    def set(self, key: Any, name: str, value: Any) -> None:
        """Writes to the base's entries."""
        self._state.setdefault(key, {})[name] = value

    def drop(self, key: Any, name: str) -> None:
        """Removes one entry, the base's or the method's."""
        if name.startswith(PREFIX):
            self._set_kept(key, name, None)
            self._beside[key].pop(name, None)
        else:
            self._state[key].pop(name, None)

    def __iter__(self) -> Iterator[Any]:
        yield from [*self._state, *(param for param in self._beside if param not in self._state)]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        """False while state is still to be made: torch looks at this."""
        return bool(self._state) or not self._comes

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:
        return dict, ({key: self[key] for key in self},)


class Entries(dict[str, Any]):
    """One parameter's entries. Writes go on to the base's state or to what the method keeps."""

    _place: tuple[StateOfBoth, Any] | None = None

    @classmethod
    def of(cls, key: Any, base: Mapping[str, Any], kept: Mapping[str, Tensor | None], state: StateOfBoth) -> Entries:
        """The entries of a parameter in a state."""
        entries = cls({**base, **kept})
        entries._place = state, key
        return entries

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if self._place is not None:
            state, key = self._place
            (state.keep if name.startswith(PREFIX) else state.set)(key, name, value)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        if self._place is not None:
            state, key = self._place
            state.drop(key, name)

    pop = MutableMapping.pop
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def not_there(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Stands in a state dict for an entry that does not exist yet: all NaN."""
    return torch.full_like(like, torch.nan, dtype=dtype, requires_grad=False)


def is_there(entry: Tensor) -> bool:
    """Whether an entry of a state dict is not :func:`not_there`. All ranks that share it must call this."""
    if not (entry.is_floating_point() or entry.is_complex()) or entry.numel() == 0:
        return True
    return not bool(torch.isnan(entry.detach()).all())
