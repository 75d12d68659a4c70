"""What a method keeps from step to step: a tensor for each parameter, which belongs to it wherever it stands."""

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

    The lists are rearranged when the parameters are others than before. What belongs to a parameter that is in no group
    waits for it to come back, and goes with it.

    Attributes:
        is_awaited: torch has asked for state before there was any, to load it or to save it: whatever a method may
            keep has a place in ``state_dict()`` then.
        stays_in_place: new values have to be written over the old ones, as a captured step needs it.
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
        """Of which a parameter has an entry."""
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
        """Drops what waits for parameters that are in no group now."""
        self._aside.pop(name, None)

    def replace(self, params: list[Tensor], lists: Lists) -> None:
        """Other lists, of these parameters; nothing of before is kept."""
        self.is_awaited = False
        self._params, self._sizes = params, _sizes_of(params)
        self._lists, self._aside, self._plan = lists, {}, None

    def follow(self, params: list[Tensor]) -> None:
        """Puts entries where their parameters are now.

        Args:
            params: a list that is never written into, so that it need not be compared.
        """
        if params is not self._params:
            self._rearrange(params)

    def follow_shapes(self) -> bool:
        """Drops entries whose parameters have got another shape. Whether some have."""
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
    """For each place whose it is, and how many places before it are the same parameter's."""
    counts: dict[int, int] = {}
    places = []
    for param in params:
        count = counts[id(param)] = counts.get(id(param), -1) + 1
        places.append((id(param), count))
    return places


SetKept = Callable[[Any, str, Tensor | None], None]


class StateOfBoth(MutableMapping[Any, Any]):
    """The base optimizer's state as users and torch see it, with what the method keeps among each parameter's entries.

    Entries of the method are not in the base's own dicts, where some bases would take their state for complete.

    Args:
        state: the base's.
        beside: for parameters what is kept for them, by names with :data:`PREFIX`; None for what there is not yet.
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
        """As a dict's: a base's state may make an entry for whatever it is asked for by index."""
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
        """What torch takes for a sign that there is no state to be made any more."""
        return bool(self._state) or not self._comes

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:
        return dict, ({key: self[key] for key in self},)


class Entries(dict[str, Any]):
    """One parameter's entries; what is written into them is written where it belongs."""

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
    """What stands in a state dict for an entry that there is not yet: no number at all."""
    return torch.full_like(like, torch.nan, dtype=dtype, requires_grad=False)


def is_there(entry: Tensor) -> bool:
    """Whether an entry of a state dict is more than :func:`not_there`; all ranks that share it must ask."""
    if not (entry.is_floating_point() or entry.is_complex()) or entry.numel() == 0:
        return True
    return not bool(torch.isnan(entry.detach()).all())
