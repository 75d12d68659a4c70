"""Makes checkpoints of a model hold the unperturbed weights, also while they are perturbed."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .optimizer import SharpnessAwareOptimizer


class UnperturbedEntries:
    """A hook of a module: its state dict gets the weights that a step under way will restore.

    A copy or a pickle of the module belongs to no optimizer, so its hook does nothing.
    """

    _from_public_api = True  # what register_state_dict_post_hook tells torch of a hook

    def __init__(self, optimizer: SharpnessAwareOptimizer | None = None) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None or not optimizer.is_step_begun:
            return
        unperturbed = optimizer._plans.weights_to_restore()
        for name, param in module.named_parameters(remove_duplicate=False):
            weight = unperturbed.get(id(param))
            if weight is not None and prefix + name in state_dict:
                state_dict[prefix + name] = weight

    def __reduce__(self) -> tuple[Any, ...]:
        return UnperturbedEntries, ()
