"""Fusing a torch base optimizer's update into the descent.

The state stays in the base optimizer under torch's own keys, so that checkpoints move to and from plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels import SGD, Adam, AdamSettings, SGDSettings
from sam_kernels.host import lookup, missing, same_objects

from .passes import Gradients

Group = dict[str, Any]


class FusedUpdate:
    """The settings and state tensors of ``torch.optim.SGD``, ``Adam`` or ``AdamW``, as the kernels want them."""

    def __init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        self.base_optimizer = base_optimizer
        self._params: list[Tensor] = []
        self._values: list[Any] = []
        self._states: list[dict[str, Any]] = []

    @staticmethod
    def supports(base_optimizer: torch.optim.Optimizer) -> bool:
        """Whether the base's class and present settings have a fused form; others take ``base_optimizer.step()``."""
        if type(base_optimizer) is torch.optim.SGD:
            tensors: Sequence[str] = ("momentum", "dampening", "weight_decay")
        elif type(base_optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            tensors = ("eps", "weight_decay")
        else:
            return False
        for group in base_optimizer.param_groups:
            if group.get("differentiable") or group.get("capturable"):
                return False
            if any(isinstance(group[key], Tensor) for key in tensors):
                return False
            if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
                return False
        return True

    def prepare(self, params: list[Tensor], gradients: Gradients) -> tuple[SGD | Adam, dict[int, dict[str, Any]]]:
        """The base for one descent, and the state it creates for parameters that have none yet.

        The second result belongs into the base optimizer, by :meth:`commit`, once the update has been made.
        """
        states = self._states_of(params)
        if type(self.base_optimizer) is torch.optim.SGD:
            return self._prepare_sgd(params, gradients, states)
        return self._prepare_adam(params, gradients, states)

    def commit(self, params: list[Tensor], created: dict[int, dict[str, Any]]) -> None:
        for index, entries in created.items():
            self.base_optimizer.state[params[index]].update(entries)

    def _states_of(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Each parameter's state. Hashing a tensor is slow, so the look-up is repeated only if a state was replaced."""
        state = self.base_optimizer.state
        values = list(state.values())
        if not (same_objects(values, self._values) and same_objects(params, self._params)):
            self._states = [state[p] if p in state else {} for p in params]
            self._values, self._params = values, list(params)
        return self._states

    def _prepare_sgd(
        self, params: list[Tensor], gradients: Gradients, states: list[dict[str, Any]]
    ) -> tuple[SGD, dict[int, dict[str, Any]]]:
        groups = self.base_optimizer.param_groups
        settings = [
            SGDSettings(
                float(g["lr"]), g["momentum"], g["dampening"], g["weight_decay"], g["nesterov"], g["maximize"]
            )
            for g in groups
        ]
        first = bytearray(len(params))
        created: dict[int, dict[str, Any]] = {}
        buffers: list[Tensor | None] = []
        if any(s.momentum != 0.0 for s in settings):
            buffers = lookup(states, "momentum_buffer")
            momentum_of = None
            for index in missing(buffers):
                if gradients[index] is None:
                    continue
                if momentum_of is None:
                    momentum_of = [s.momentum for s, g in zip(settings, groups, strict=True) for _ in g["params"]]
                if momentum_of[index] != 0.0:
                    buffers[index] = torch.zeros_like(params[index], requires_grad=False)
                    first[index] = 1
                    created[index] = {"momentum_buffer": buffers[index]}
        return SGD(settings, buffers, first), created

    def _prepare_adam(
        self, params: list[Tensor], gradients: Gradients, states: list[dict[str, Any]]
    ) -> tuple[Adam, dict[int, dict[str, Any]]]:
        groups = self.base_optimizer.param_groups
        # Adam with decoupled_weight_decay is AdamW, whatever the class.
        adamw = isinstance(self.base_optimizer, torch.optim.AdamW)
        settings = [
            AdamSettings(
                float(g["lr"]),
                *g["betas"],
                g["eps"],
                g["weight_decay"],
                bool(g.get("decoupled_weight_decay", adamw)),
                g["amsgrad"],
                g["maximize"],
            )
            for g in groups
        ]
        keys = ["exp_avg", "exp_avg_sq"]
        if any(s.amsgrad for s in settings):
            keys.append("max_exp_avg_sq")
        columns = {key: lookup(states, key) for key in (*keys, "step")}
        created: dict[int, dict[str, Any]] = {}
        group_of = None
        for key, column in columns.items():
            for index in missing(column):
                if gradients[index] is None:
                    continue
                if group_of is None:
                    group_of = [number for number, g in enumerate(groups) for _ in g["params"]]
                if key == "max_exp_avg_sq" and not settings[group_of[index]].amsgrad:
                    continue
                if key == "step":
                    # torch keeps it in the default dtype; float64 only if that is float64.
                    double = torch.get_default_dtype() == torch.float64
                    column[index] = torch.zeros((), dtype=torch.float64 if double else torch.float32)
                else:
                    column[index] = torch.zeros_like(params[index], requires_grad=False)
                created.setdefault(index, {})[key] = column[index]
        maxima = columns.get("max_exp_avg_sq", [])
        return Adam(settings, columns["exp_avg"], columns["exp_avg_sq"], maxima, columns["step"]), created
