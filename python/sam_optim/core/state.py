"""An optimizer's groups and state: those of its base optimizer, with what a method adds to them."""

from __future__ import annotations

import copy
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_kernels.host import same_objects
from sam_kernels.sharding import local_part

from .base_update import BaseUpdate
from .construction import defaults_of, puts_into_groups
from .errors import InvalidSettingError, StepOrderError
from .kept import PREFIX, KeptState, Lists, StateOfBoth, is_there, not_there
from .moves import Moves, StepReport
from .planning import PlanCache
from .settings import check_group_keys, settings_of

# The masters' name among what is kept for parameters.
_MASTERS = "master_weights"

# Where a state dict has, by position, what is kept for parameters without state of the base.
_LISTS = "method_state"

# The base's, where it gives a list of several optimizers', or another form that is no dict.
_OF_BASE = "base_state"

# Copies of weights and gradients that other SAM classes leave in their state between steps.
_LEFT_BY_OTHERS = frozenset({"old_p", "old_g", "e_w"})


class _Loaded(NamedTuple):
    """What a state dict has for parameters.

    Attributes:
        lists: what the method keeps for them, and their masters, in the order of the groups.
        keys: of their entries in ``state``, in the same order.
        state: the base's.
    """

    lists: Lists
    keys: list[Any]
    state: Mapping[Any, Any]


class GroupsAndState(Moves, Optimizer):
    """What is kept from step to step, and where: groups and state in the base optimizer, the rest in a container.

    Attributes:
        base_optimizer: the base.
        defaults: of settings that a group added by :meth:`add_param_group` does not have: the base's and the method's.
        master_weights: whether weights in bfloat16 and float16 have float32 masters.
        process_group: of the ranks that hold other parameters of the same model; None if there are none.
        counts_in_norm: whether this rank counts a parameter in sums over them; None for all.
    """

    master_weights: bool
    process_group: Any
    counts_in_norm: Callable[[Tensor], bool] | None
    _method_defaults: dict[str, Any]
    _given_defaults: dict[str, Any]  # the base's

    # What the method keeps under names of other packages: from theirs to ours.
    _names_elsewhere: Mapping[str, str] = MappingProxyType({})

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
    def base_optimizer(self) -> Optimizer:
        """Makes the updates. It stays what it was made or given as; whatever it has can be changed.

        Raises:
            InvalidSettingError: if another one is assigned.
        """
        try:
            base: Optimizer = vars(self)["base_optimizer"]
        except KeyError:
            # Lightning's wrapper is of this class, too, and looks elsewhere for what it does not have.
            raise AttributeError("base_optimizer") from None
        return base

    @base_optimizer.setter
    def base_optimizer(self, base: Any) -> None:
        own = vars(self).get("base_optimizer")
        if base is not own:
            name = type(self).__name__
            raise InvalidSettingError(
                f"base_optimizer of {name} cannot be replaced, by {type(base).__name__} neither: everything here is "
                f"made for {type(own).__name__}. Make another optimizer, {name}(params, {type(base).__name__}, ...), "
                "and go on with that"
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's groups, with this method's settings added."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state, and among a parameter's entries what the method keeps for it.

        Names of the latter begin with ``sam_optim_``. Masters can be read there, and are set by ``load_state_dict()``.
        """
        beside = self._beside()
        base: Any = self.base_optimizer.state
        if not beside:
            return base
        return StateOfBoth(base, beside, self._set_kept, not all(map(self._is_stateless, self.param_groups)))

    @state.setter
    def state(self, state: Any) -> None:
        if not isinstance(state, StateOfBoth):
            self.base_optimizer.state = state
            kept: KeptState = self._container["method state"]
            kept.replace([], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, with the ``defaults`` of both where it does not say otherwise.

        Groups that were added to the base optimizer itself, or to ``param_groups``, get them when the next step begins.

        Raises:
            StepOrderError: in the middle of a step.
            InvalidSettingError: for a setting out of range. What is refused, by the base too, changes nothing.
        """
        self._refuse_mid_step("add_param_group() was called")
        base = self.base_optimizer
        if not isinstance(param_group, dict):
            base.add_param_group(param_group)  # torch says what it wants
            return
        self._check_keys(param_group)
        # What is the base's and was not changed here is left to the base.
        given = self._given_defaults
        changed = {key: value for key, value in self.defaults.items() if key not in given or given[key] is not value}
        own = {**changed, **param_group}
        count, known = len(base.param_groups), set(base.state)
        base.add_param_group(own)
        try:
            for group in base.param_groups[count:]:
                self.validate_group(group)
        except BaseException:
            del base.param_groups[count:]
            for param in set(base.state) - known:
                del base.state[param]
            raise
        if len(base.param_groups) > count and base.param_groups[-1] is own:
            # torch completes the dict that it is given, and keeps it.
            param_group.update(own)
            base.param_groups[-1] = param_group

    def state_dict(self) -> dict[str, Any]:
        """Base and method state, loadable by the plain base optimizer too. The perturbation is never part of it.

        What the method keeps for a parameter, and its master, stand among the base's entries for it, under names that
        begin with ``sam_optim_``; for parameters without state of the base they are in ``"method_state"``.

        Raises:
            StepOrderError: in the middle of a step, once it has changed anything.
        """
        if not self._is_step_as_if_not_begun():
            self._refuse_mid_step("state_dict() was called")
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._packed()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def _packed(self) -> dict[str, Any]:
        if self._has_own_form:
            of_base: Any = self.base_optimizer.state_dict()
            return self._with_kept(dict(of_base) if isinstance(of_base, Mapping) else {_OF_BASE: of_base})
        # torch's own, without the hooks, which are to see what is kept as well.
        bare = SimpleNamespace(param_groups=self.param_groups, state=self.base_optimizer.state)
        bare._optimizer_state_dict_pre_hooks = bare._optimizer_state_dict_post_hooks = {}
        return self._with_kept(Optimizer.state_dict(cast(Any, bare)))

    def _with_kept(self, packed: dict[str, Any]) -> dict[str, Any]:
        """Adds to the base's state dict what is kept beside it."""
        beside, params = self._beside(), self._params()
        keys: dict[Tensor, Any] = {}
        if beside:
            keys.update(zip(params, chain.from_iterable(g["params"] for g in packed["param_groups"]), strict=True))
        for p, kept in beside.items():
            state = packed["state"]
            filled = {k: not_there(p, self._state_dtype(p)) if v is None else v for k, v in kept.items()}
            # Not in place: these dicts are the base's own.
            state[keys[p]] = {**state.get(keys[p], {}), **filled}
        for name, entries in self._kept_lists().items():
            rest = [None if p in beside else entry for p, entry in zip(params, entries, strict=True)]
            if any(entry is not None for entry in rest):
                packed.setdefault(_LISTS, {})[name] = rest
        return packed

    def _watch_base(self) -> None:
        """Lets the base's own state dict be complete too: who saves and loads by the base alone loses nothing."""
        if self._has_own_form or not isinstance(self.base_optimizer, Optimizer):
            return
        # What it has carried along from a checkpoint of ours may be older than its own state.
        for entries in self.base_optimizer.state.values():
            for name in [name for name in entries if _is_kept(name)] if isinstance(entries, dict) else ():
                del entries[name]
        reference = weakref.ref(self)  # the base would hold this optimizer, which holds the base

        def add(base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
            own = reference()
            return None if own is None else own._with_kept(state_dict)

        def take(base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
            own = reference()
            if own is not None and not own._container["loading"]:
                own._refuse_mid_step("the base optimizer's load_state_dict() was called")
                own._container["loaded"] = own._unpack(state_dict)
            return state_dict

        def finish(base: Optimizer) -> None:
            own = reference()
            if own is not None and own._container["loaded"] is not None:
                loaded, own._container["loaded"] = own._container["loaded"], None
                own._take_loaded(loaded)

        self.base_optimizer.register_state_dict_post_hook(add)
        self.base_optimizer.register_load_state_dict_pre_hook(take)
        self.base_optimizer.register_load_state_dict_post_hook(finish)

    @property
    def _has_own_form(self) -> bool:
        """Whether the base gives its state in another form than torch's."""
        return getattr(type(self.base_optimizer), "state_dict", None) is not Optimizer.state_dict

    def _kept_lists(self) -> Lists:
        """Everything that is kept for parameters, in the order of the groups."""
        kept: KeptState = self._container["method state"]
        kept.follow(self._params())
        lists: Lists = {name: kept.entries(name) for name in kept.names}
        masters = self._masters()
        return lists if masters is None else {**lists, _MASTERS: masters}

    def _beside(self) -> dict[Tensor, dict[str, Tensor | None]]:
        """What is kept for parameters and can stand among the base's entries without being taken for them.

        None stands for what the method has yet to come to keep. It has its place from the beginning, because
        ``torch.distributed.checkpoint`` reads from a checkpoint only what the optimizer that is to load it has.
        """
        lists = self._kept_lists()
        if self._has_own_form or not (lists or self.method_state_names):
            return {}
        kept: KeptState = self._container["method state"]
        state = self.base_optimizer.state
        stateless = [self._is_stateless(group) for group in self.param_groups for _ in group["params"]]
        beside: dict[Tensor, dict[str, Tensor | None]] = {}
        for index, p in enumerate(self._params()):
            if p in beside:
                continue
            found = {PREFIX + name: entries[index] for name, entries in lists.items() if entries[index] is not None}
            if state.get(p) or (stateless[index] and (found or (kept.is_awaited and p.requires_grad))):
                places = self.method_state_names if p.is_floating_point() or p.is_complex() else ()
                if found or places:
                    beside[p] = {**dict.fromkeys(PREFIX + name for name in places), **found}
        return beside

    def _is_stateless(self, group: dict[str, Any]) -> bool:
        """Whether the base has no state for a group, nor minds that of others."""
        return type(self.base_optimizer) is torch.optim.SGD and group["momentum"] == 0.0

    def _set_kept(self, param: Tensor, name: str, value: Tensor | None) -> None:
        """Writes to what is kept; masters follow their weights, and are left."""
        name = name.removeprefix(PREFIX)
        if name == _MASTERS:
            return
        entries = self.method_state(name)
        for index, p in enumerate(self._params()):
            if p is param:
                entries[index] = value

    def _masters(self) -> list[Tensor | None] | None:
        if not self.master_weights:
            return None
        self._params()
        plans: PlanCache = self._container["plans"]
        if not (plans.has_waiting_masters or self.is_step_begun):
            plans.catch_up()
        return plans.masters

    def _is_state_asked_for(self) -> bool:
        """Whether ``step()`` is torch's way of asking for state that is yet to come: lr 0, and zeros as gradients."""
        groups = self.param_groups
        if not all(group.get("lr") is not None and float(group["lr"]) == 0.0 for group in groups):
            return False
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        return bool(gradients) and not any(bool(local_part(g).any()) for g in gradients)

    def _make_state(self) -> None:
        """The state that there would be after a first step, still without anything in it."""
        params = self._params()
        update: BaseUpdate = self._container["update"]
        update.make_state(params)
        kept: KeptState = self._container["method state"]
        kept.is_awaited = True
        if self.master_weights:
            plans: PlanCache = self._container["plans"]
            plans.begin_masters()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer or of the plain base optimizer; all of it, or nothing if it raises.

        Settings of the method that it lacks stay as they are. Copies of weights, as other SAM classes leave them in
        their state, are left out.

        Raises:
            StepOrderError: in the middle of a step.
            ValueError: for another number of groups or parameters, or other shapes.
        """
        self._refuse_mid_step("load_state_dict() was called")
        state_dict = state_dict.copy() if isinstance(state_dict, Mapping) else {_OF_BASE: state_dict}
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        loaded = self._unpack(state_dict)
        self._container["loading"] = True
        try:
            self.base_optimizer.load_state_dict(state_dict.get(_OF_BASE, state_dict))
        finally:
            self._container["loading"] = False
        self._take_loaded(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _take_loaded(self, loaded: _Loaded) -> None:
        """What was beside the base's state, once that is loaded."""
        params = self._params()
        plans: PlanCache = self._container["plans"]
        plans.masters = loaded.lists.pop(_MASTERS, None)
        update: BaseUpdate = self._container["update"]
        if self.master_weights:
            pairs = zip(loaded.keys, params, strict=True)
            update.widen_state({p: loaded.state[k] for k, p in pairs if k in loaded.state})
        kept: KeptState = self._container["method state"]
        kept.replace(params, loaded.lists)
        self._container["previous closure"] = None
        self._container["loads"] += 1

    def _unpack(self, state_dict: dict[str, Any]) -> _Loaded:
        """Takes what is kept for parameters out of a state dict, and what other classes have left in it.

        Settings of the method that its groups lack are put in.
        """
        params = self._params()
        lists: Lists = {}
        for name, entries in (state_dict.pop(_LISTS, None) or {}).items():
            if len(entries) != len(params):
                raise ValueError(f"the state dict has {len(entries)} entries of {name!r} for {len(params)} parameters")
            lists[name] = list(entries)
        self._unwrap(state_dict, lists)
        groups: list[dict[str, Any]] = state_dict.get("param_groups", [])  # a base may have a form of its own
        keys = list(chain.from_iterable(group["params"] for group in groups))
        if groups:
            own_keys = [*self._method_defaults, "initial_rho"]
            # Other SAM classes keep settings in groups that are the whole optimizer's here.
            elsewhere = {k for k in settings_of(type(self)) if k not in own_keys and not self._is_of_base(k)}
            # A different number of groups is left to torch to complain of.
            pairs = zip(groups, self.param_groups, strict=False)
            merged = [
                {**{k: own[k] for k in own_keys if k in own}, **{k: v for k, v in saved.items() if k not in elsewhere}}
                for saved, own in pairs
            ]
            state_dict["param_groups"] = merged + groups[len(merged) :]
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
        """Of a wrapper that saves its base's state dict within its own, as pytorch-optimizer's do: that of the base."""
        base = state_dict.get("base_optimizer")
        if self._has_own_form or not isinstance(base, Mapping) or not {"state", "param_groups"} <= base.keys():
            return
        count = len(self._params())
        del state_dict["base_optimizer"]
        keys = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        for index, key in enumerate(keys[:count]):
            entries = state_dict["state"].get(key, {})
            for theirs, own in self._names_elsewhere.items():
                if theirs in entries:
                    lists.setdefault(own, [None] * count)[index] = entries[theirs]
        pairs = zip(state_dict["param_groups"], base["param_groups"], strict=False)
        state_dict["param_groups"] = [{**outer, **inner} for outer, inner in pairs]
        state_dict["state"] = base["state"]

    def _divide(self, state: Mapping[Any, Any], keys: list[Any], lists: Lists) -> dict[Any, Any]:
        """The base's part of a state dict's state; what is kept by the method goes into the lists."""
        count = len(self._params())
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
                f"{type(self.base_optimizer).__name__} starts with the state of a new one",
                stacklevel=4,
            )
        return of_base

    def _loaded(self, name: str, index: int, param: Tensor, value: Tensor | None) -> Tensor | None:
        """A copy of one entry, where its parameter lies."""
        if value is None or not is_there(value):
            return None
        if value.shape != param.shape:
            plans: PlanCache = self._container["plans"]
            raise ValueError(
                f"the state dict's {name!r} of {plans.plan.names[index]} has the shape {tuple(value.shape)}, and the "
                f"parameter has {tuple(param.shape)}: it was saved with other parameters, or in another order"
            )
        dtype = value.dtype if name == _MASTERS else self._state_dtype(param)
        return value.detach().to(device=param.device, dtype=dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_mid_step("the optimizer was copied or pickled")
        dropped = ("_container", "step", "grad_scale", "found_inf", "generators")
        # As by torch, hooks stay behind: they are bound to what they were made for.
        kept = {k: v for k, v in self.__dict__.items() if k not in dropped and not _are_hooks(k)}
        lists = self._kept_lists()
        return {**kept, "masters": lists.pop(_MASTERS, None), "method state": lists}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        lists: Lists = state.pop("method state", {})
        masters = state.pop("masters", None)
        super().__setstate__(state)
        self._reset_caches()
        self._watch_base()
        params = [p for group in self.param_groups for p in group["params"]]
        kept: KeptState = self._container["method state"]
        # An older version may have had lists that ended with the last parameter that it had met.
        kept.replace(params, {name: [*v, *[None] * (len(params) - len(v))] for name, v in lists.items()})
        plans: PlanCache = self._container["plans"]
        plans.masters = masters

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.process_group is not None:
            raise TypeError(
                "an optimizer with a process_group cannot be pickled, since a process group belongs to its process: "
                "save its state_dict(), and load that into an optimizer made with the group of the other process"
            )
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.counts_in_norm is not None:
            raise TypeError(
                "an optimizer with counts_in_norm cannot be copied, since that speaks of its own parameters: make "
                "another optimizer for the copied model, and load this one's state_dict()"
            )
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def _params(self) -> list[Tensor]:
        """All parameters, group by group, as the kernels' plan of this moment holds them."""
        are_known = same_objects(list(self.param_groups), self._container["known groups"])
        if not are_known:
            self._complete_groups()
        plans: PlanCache = self._container["plans"]
        params = plans.update(self.param_groups, self.geometry_of, self.is_perturbed_group).params
        if not are_known:
            self._adopt_kept(params)
        return params

    def _adopt_kept(self, params: list[Tensor]) -> None:
        """Takes what is kept out of the base's state, where its own ``load_state_dict()`` has put it and ran no hooks.

        bitsandbytes' do so, when a checkpoint is loaded by the base alone.
        """
        state = self.base_optimizer.state if isinstance(self.base_optimizer, Optimizer) else {}
        found = {p: e for p, e in state.items() if isinstance(e, dict) and any(map(_is_kept, e))}
        if not found or self._has_own_form:
            return
        kept: KeptState = self._container["method state"]
        kept.follow(params)
        for index, p in enumerate(params):
            entries = found.get(p, {})
            for key in [key for key in entries if _is_kept(key)]:
                name = key.removeprefix(PREFIX)
                kept.entries(name)[index] = self._loaded(name, index, p, entries.pop(key))

    def _complete_groups(self) -> None:
        """Groups that somebody has added to the base optimizer get its defaults and this method's."""
        known = self._container["known groups"]
        if known:
            self._refuse_mid_step("param_groups were changed")
        for group in self.param_groups:
            if any(group is other for other in known):
                continue
            if not isinstance(group, dict) or "params" not in group:
                raise InvalidSettingError(f"Invalid entry of param_groups: {group!r}; it must be a dict with 'params'")
            params = group["params"]
            if not isinstance(params, list):
                group["params"] = [params] if isinstance(params, Tensor) else list(params)
            self._complete_group(group, self.defaults)
        self._container["known groups"] = list(self.param_groups)

    def _complete_group(self, group: dict[str, Any], defaults: dict[str, Any]) -> None:
        if not isinstance(group, dict):
            raise TypeError(f"a parameter group is a dict, got {group!r}")
        self._check_keys(group)
        for key, value in defaults.items():
            group.setdefault(key, value)
        self.validate_group(group)

    def _check_keys(self, group: dict[str, Any]) -> None:
        of_groups = [*self._method_defaults, *({"perturb"} - self._method_defaults.keys())]
        check_group_keys(group, type(self), of_groups, defaults_of(self.base_optimizer), self._is_of_base)

    def _is_of_base(self, key: str) -> bool:
        """Whether a key of a group is the base's."""
        return key in defaults_of(self.base_optimizer) or puts_into_groups(self.base_optimizer, key)

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
            "known groups": [],
            "mode": None,
            "side by side": False,
            "in place": False,
            "loads": 0,
            "loading": False,
            "loaded": None,
            "report": StepReport(),
            "method state": KeptState(),
            "previous closure": None,
            "descent handler": None,
            "followers": [],
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


def _is_kept(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(PREFIX)


def _are_hooks(attribute: str) -> bool:
    return attribute.startswith("_optimizer_") and attribute.endswith("_hooks")
