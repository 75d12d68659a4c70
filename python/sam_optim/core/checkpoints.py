"""Saving and loading: the base optimizer's state, what a method keeps for parameters, and their masters."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_kernels.sharding import local_part

from . import groups
from .checks import keywords_of
from .kept import PREFIX, Lists, StateOfBoth, is_there, not_there

if TYPE_CHECKING:
    from .optimizer import SharpnessAwareOptimizer

# The masters' name among what is kept for parameters.
_MASTERS = "master_weights"

# Where a state dict has, by position, what is kept for parameters without state of the base.
_LISTS = "method_state"

# The base's, where it gives a list of several optimizers', or another form that is no dict.
_OF_BASE = "base_state"

# Copies of weights and gradients that other SAM classes leave in their state between steps.
_LEFT_BY_OTHERS = frozenset({"old_p", "old_g", "e_w"})


class _Loaded(NamedTuple):
    """What a state dict holds for parameters.

    Attributes:
        lists: what the method keeps for them, and their masters, in the order of the groups.
        keys: the keys of their entries in ``state``, in the same order.
        state: the base's state.
    """

    lists: Lists
    keys: list[Any]
    state: Mapping[Any, Any]


class Checkpoints:
    """An optimizer's state as users see it, and as it is saved and loaded.

    It has a weak reference to the optimizer, which holds it.

    Attributes:
        loads: how often state was loaded.
    """

    __slots__ = ("__weakref__", "_is_loading", "_loaded_by_base", "_owner", "loads")

    def __init__(self, optimizer: SharpnessAwareOptimizer) -> None:
        self._owner = weakref.ref(optimizer)
        self._is_loading = False
        self._loaded_by_base: _Loaded | None = None
        self.loads = 0

    @property
    def optimizer(self) -> SharpnessAwareOptimizer:
        """The optimizer whose state it is."""
        optimizer = self._owner()
        assert optimizer is not None, "the optimizer is gone"
        return optimizer

    # ------------------------------------------------------------------ as it is seen

    @property
    def state(self) -> Any:
        """The base's state; a parameter's entries include what the method keeps for it."""
        optimizer = self.optimizer
        beside = self._beside()
        base: Any = optimizer._base.state
        if not beside:
            return base
        return StateOfBoth(base, beside, self._set_kept, not all(map(self._is_stateless, optimizer.param_groups)))

    @state.setter
    def state(self, state: Any) -> None:
        if not isinstance(state, StateOfBoth):
            self.optimizer._base.state = state
            self.optimizer._kept.replace([], {})

    def pickled(self) -> dict[str, Any]:
        """What is kept for parameters, for a pickle or a copy of the optimizer. The base pickles its own state."""
        lists = self._kept_lists()
        return {"masters": lists.pop(_MASTERS, None), "method state": lists}

    def unpickled(self, state: dict[str, Any]) -> None:
        """Moves what :meth:`pickled` gave out of a state into this optimizer."""
        optimizer = self.optimizer
        lists: Lists = state.pop("method state", {})
        masters = state.pop("masters", None)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer._kept.replace(params, lists)
        optimizer._plans.masters = masters

    # ------------------------------------------------------------------ as it is saved and loaded

    def save(self) -> dict[str, Any]:
        """What ``state_dict()`` gives, with its hooks run.

        Raises:
            StepOrderError: in the middle of a step, once that has changed anything.
        """
        optimizer = self.optimizer
        if not optimizer.stepper.is_as_if_not_begun():
            optimizer.stepper.refuse_mid_step("state_dict() was called")
        for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
            pre_hook(optimizer)
        state_dict = self._pack()
        for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
            changed = post_hook(optimizer, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load(self, state_dict: Any) -> None:
        """What ``load_state_dict()`` does, with its hooks run; all of it, or nothing if it raises."""
        optimizer = self.optimizer
        optimizer.stepper.refuse_mid_step("load_state_dict() was called")
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else {_OF_BASE: state_dict}
        for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(optimizer, state_dict)
            state_dict = state_dict if changed is None else changed
        loaded = self._unpack(state_dict)
        self._is_loading = True
        try:
            optimizer._base.load_state_dict(state_dict.get(_OF_BASE, state_dict))
        finally:
            self._is_loading = False
        self._take_loaded(loaded)
        for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
            post_hook(optimizer)

    @property
    def _has_own_form(self) -> bool:
        """Whether the base gives its state in another form than torch's."""
        return getattr(type(self.optimizer._base), "state_dict", None) is not Optimizer.state_dict

    def _pack(self) -> dict[str, Any]:
        if self._has_own_form:
            of_base: Any = self.optimizer._base.state_dict()
            return self.with_kept(dict(of_base) if isinstance(of_base, Mapping) else {_OF_BASE: of_base})
        # torch's own, without the hooks, which are to see what is kept as well.
        bare = SimpleNamespace(param_groups=self.optimizer.param_groups, state=self.optimizer._base.state)
        bare._optimizer_state_dict_pre_hooks = bare._optimizer_state_dict_post_hooks = {}
        return self.with_kept(Optimizer.state_dict(cast(Any, bare)))

    def with_kept(self, packed: dict[str, Any]) -> dict[str, Any]:
        """Adds to the base's state dict what is kept beside it."""
        beside, params = self._beside(), self.optimizer._params()
        keys: dict[Tensor, Any] = {}
        if beside:
            keys.update(zip(params, chain.from_iterable(g["params"] for g in packed["param_groups"]), strict=True))
        for p, kept in beside.items():
            state = packed["state"]
            filled = {k: not_there(p, self.optimizer._state_dtype(p)) if v is None else v for k, v in kept.items()}
            # Not in place: these dicts are the base's own.
            state[keys[p]] = {**state.get(keys[p], {}), **filled}
        for name, entries in self._kept_lists().items():
            rest = [None if p in beside else entry for p, entry in zip(params, entries, strict=True)]
            if any(entry is not None for entry in rest):
                packed.setdefault(_LISTS, {})[name] = rest
        return packed

    def watch_base(self) -> None:
        """Makes the base's own state dict complete too, so that saving and loading it alone loses nothing."""
        if self._has_own_form or not isinstance(self.optimizer._base, Optimizer):
            return
        # What it has carried along from a checkpoint of ours may be older than its own state.
        for entries in self.optimizer._base.state.values():
            for name in [name for name in entries if _is_kept(name)] if isinstance(entries, dict) else ():
                del entries[name]
        reference = weakref.ref(self)  # the base would hold this optimizer, which holds the base

        def add(base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
            own = reference()
            return None if own is None else own.with_kept(state_dict)

        def take(base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
            own = reference()
            if own is not None and not own._is_loading:
                own.optimizer.stepper.refuse_mid_step("the base optimizer's load_state_dict() was called")
                own._loaded_by_base = own._unpack(state_dict)
            return state_dict

        def finish(base: Optimizer) -> None:
            own = reference()
            if own is not None and own._loaded_by_base is not None:
                loaded, own._loaded_by_base = own._loaded_by_base, None
                own._take_loaded(loaded)

        self.optimizer._base.register_state_dict_post_hook(add)
        self.optimizer._base.register_load_state_dict_pre_hook(take)
        self.optimizer._base.register_load_state_dict_post_hook(finish)

    def _kept_lists(self) -> Lists:
        """Everything that is kept for parameters, in the order of the groups."""
        kept = self.optimizer._kept
        kept.follow(self.optimizer._params())
        lists: Lists = {name: kept.entries(name) for name in kept.names}
        masters = self._masters()
        return lists if masters is None else {**lists, _MASTERS: masters}

    def _beside(self) -> dict[Tensor, dict[str, Tensor | None]]:
        """What is kept for parameters and can stand among the base's entries without being taken for them.

        None stands for what the method does not keep yet. It has its place from the beginning, because
        ``torch.distributed.checkpoint`` reads only what the optimizer that loads already has.
        """
        lists = self._kept_lists()
        if self._has_own_form or not (lists or self.optimizer.method_state_names):
            return {}
        kept = self.optimizer._kept
        state = self.optimizer._base.state
        stateless = [self._is_stateless(group) for group in self.optimizer.param_groups for _ in group["params"]]
        beside: dict[Tensor, dict[str, Tensor | None]] = {}
        for index, p in enumerate(self.optimizer._params()):
            if p in beside:
                continue
            found = {PREFIX + name: entries[index] for name, entries in lists.items() if entries[index] is not None}
            if state.get(p) or (stateless[index] and (found or (kept.is_awaited and p.requires_grad))):
                places = self.optimizer.method_state_names if p.is_floating_point() or p.is_complex() else ()
                if found or places:
                    beside[p] = {**dict.fromkeys(PREFIX + name for name in places), **found}
        return beside

    def _is_stateless(self, group: dict[str, Any]) -> bool:
        """Whether the base has no state for a group, and does not mind other entries in it."""
        return type(self.optimizer._base) is torch.optim.SGD and group["momentum"] == 0.0

    def _set_kept(self, param: Tensor, name: str, value: Tensor | None) -> None:
        """Writes to what is kept. Masters follow their weights, and are left alone."""
        name = name.removeprefix(PREFIX)
        if name == _MASTERS:
            return
        entries = self.optimizer.method_state(name)
        for index, p in enumerate(self.optimizer._params()):
            if p is param:
                entries[index] = value

    def _masters(self) -> list[Tensor | None] | None:
        if not self.optimizer.master_weights:
            return None
        self.optimizer._params()
        plans = self.optimizer._plans
        if not (plans.has_waiting_masters or self.optimizer.is_step_begun):
            plans.catch_up()
        return plans.masters

    def is_state_asked_for(self) -> bool:
        """Whether torch calls ``step()`` to have state made: lr is 0 and all gradients are zeros."""
        groups = self.optimizer.param_groups
        if not all(group.get("lr") is not None and float(group["lr"]) == 0.0 for group in groups):
            return False
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        return bool(gradients) and not any(bool(local_part(g).any()) for g in gradients)

    def make_state(self) -> None:
        """Makes the state that there would be after a first step, without any content."""
        params = self.optimizer._params()
        update = self.optimizer._base_update
        update.make_state(params)
        kept = self.optimizer._kept
        kept.is_awaited = True
        if self.optimizer.master_weights:
            plans = self.optimizer._plans
            plans.begin_masters()

    def _take_loaded(self, loaded: _Loaded) -> None:
        """Takes over what stood beside the base's state, after that has been loaded."""
        params = self.optimizer._params()
        plans = self.optimizer._plans
        plans.masters = loaded.lists.pop(_MASTERS, None)
        update = self.optimizer._base_update
        if self.optimizer.master_weights:
            pairs = zip(loaded.keys, params, strict=True)
            update.widen_state({p: loaded.state[k] for k, p in pairs if k in loaded.state})
        kept = self.optimizer._kept
        kept.replace(params, loaded.lists)
        self.optimizer.stepper.step.previous_closure = None
        self.loads += 1

    def _unpack(self, state_dict: dict[str, Any]) -> _Loaded:
        """Takes out of a state dict what is kept for parameters, and what other SAM classes have left in it.

        Settings of the method that the groups in it lack are added.
        """
        params = self.optimizer._params()
        lists: Lists = {}
        for name, entries in (state_dict.pop(_LISTS, None) or {}).items():
            if len(entries) != len(params):
                raise ValueError(f"the state dict has {len(entries)} entries of {name!r} for {len(params)} parameters")
            lists[name] = list(entries)
        self._unwrap(state_dict, lists)
        saved_groups: list[dict[str, Any]] = state_dict.get("param_groups", [])  # a base may have a form of its own
        keys = list(chain.from_iterable(group["params"] for group in saved_groups))
        if saved_groups:
            own_keys = [*self.optimizer._method_defaults, "initial_rho"]
            # Other SAM classes keep in groups what is the whole optimizer's here.
            others = [k for k in keywords_of(type(self.optimizer)) if k not in own_keys]
            elsewhere = {k for k in others if not groups.is_of_base(self.optimizer, k)}
            merged = []
            # A different number of groups is left to torch to complain of.
            for saved, own in zip(saved_groups, self.optimizer.param_groups, strict=False):
                loaded = self.optimizer._with_loaded_settings(saved, own)
                kept = {k: own[k] for k in own_keys if k in own}
                merged.append({**kept, **{k: v for k, v in loaded.items() if k not in elsewhere}})
            state_dict["param_groups"] = merged + saved_groups[len(merged) :]
        state = state_dict.get("state")
        if isinstance(state, Mapping) and not self._has_own_form:
            state_dict["state"] = self._divide(state, keys, lists)
        return _Loaded(
            {
                name: [self._loaded(name, i, p, v) for i, (p, v) in enumerate(zip(params, entries, strict=True))]
                for name, entries in lists.items()
            },
            keys,
            state_dict.get("state", {}),
        )

    def _unwrap(self, state_dict: dict[str, Any], lists: Lists) -> None:
        """Unpacks the base's state dict where a wrapper saves it within its own, as pytorch-optimizer's do."""
        base = state_dict.get("base_optimizer")
        if self._has_own_form or not isinstance(base, Mapping) or not {"state", "param_groups"} <= base.keys():
            return
        count = len(self.optimizer._params())
        del state_dict["base_optimizer"]
        keys = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        for index, key in enumerate(keys[:count]):
            entries = state_dict["state"].get(key, {})
            for theirs, own in self.optimizer._names_elsewhere.items():
                if theirs in entries:
                    lists.setdefault(own, [None] * count)[index] = entries[theirs]
        pairs = zip(state_dict["param_groups"], base["param_groups"], strict=False)
        state_dict["param_groups"] = [{**outer, **inner} for outer, inner in pairs]
        state_dict["state"] = base["state"]

    def _divide(self, state: Mapping[Any, Any], keys: list[Any], lists: Lists) -> dict[Any, Any]:
        """The base's part of a state dict's state; what the method keeps goes into the lists."""
        count = len(self.optimizer._params())
        places: dict[Any, list[int]] = {}
        for index, key in enumerate(keys[:count]):
            places.setdefault(key, []).append(index)
        of_base: dict[Any, Any] = {}
        copies: set[str] = set()
        for key, entries in state.items():
            if not isinstance(entries, Mapping):
                of_base[key] = entries
                continue
            rest = {k: v for k, v in entries.items() if not _is_kept(k) and k not in _LEFT_BY_OTHERS}
            if rest or not entries:
                of_base[key] = rest
            else:
                copies |= _LEFT_BY_OTHERS.intersection(entries)
            for name, value in entries.items():
                if _is_kept(name):
                    own = lists.setdefault(name.removeprefix(PREFIX), [None] * count)
                    for index in places.get(key, []):
                        own[index] = value if own[index] is None else own[index]
        if copies:
            warnings.warn(
                "the checkpoint is of another SAM class: it has copies of weights or gradients "
                f"({', '.join(sorted(copies))}), which are left out, and nothing of its base optimizer's state; "
                f"{type(self.optimizer._base).__name__} starts with the state of a new one",
                stacklevel=4,
            )
        return of_base

    def _loaded(self, name: str, index: int, param: Tensor, value: Tensor | None) -> Tensor | None:
        """A copy of one entry, on the device of its parameter."""
        if value is None or not is_there(value):
            return None
        if value.shape != param.shape:
            plans = self.optimizer._plans
            raise ValueError(
                f"the state dict's {name!r} of {plans.plan.names[index]} has the shape {tuple(value.shape)}, and the "
                f"parameter has {tuple(param.shape)}: it was saved with other parameters, or in another order"
            )
        dtype = value.dtype if name == _MASTERS else self.optimizer._state_dtype(param)
        return value.detach().to(device=param.device, dtype=dtype, copy=True)

    def adopt_kept(self, params: list[Tensor]) -> None:
        """Takes what is kept out of the base's state, where a ``load_state_dict()`` without hooks has put it.

        bitsandbytes' optimizers do so, if a checkpoint is loaded by the base alone.
        """
        state = self.optimizer._base.state if isinstance(self.optimizer._base, Optimizer) else {}
        found = {p: e for p, e in state.items() if isinstance(e, dict) and any(map(_is_kept, e))}
        if not found or self._has_own_form:
            return
        kept = self.optimizer._kept
        kept.follow(params)
        for index, p in enumerate(params):
            entries = found.get(p, {})
            for key in [key for key in entries if _is_kept(key)]:
                name = key.removeprefix(PREFIX)
                kept.entries(name)[index] = self._loaded(name, index, p, entries.pop(key))


def _is_kept(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(PREFIX)
