"""Parameter groups by the modules that parameters belong to."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

# BatchNorm, SyncBatchNorm and InstanceNorm are _NormBase.
NORMALIZATIONS: tuple[type[nn.Module], ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def perturb_normalization_only(model: nn.Module, *more: type[nn.Module]) -> list[dict[str, Any]]:
    """Groups for SAM-ON (Mueller et al. 2023, arXiv 2306.04226): only normalisation layers are perturbed.

    ::

        optimizer = SAM(perturb_normalization_only(model), torch.optim.SGD, rho=0.5, lr=0.1)

    Chosen by the type of the module, not by the parameter's name.

    Args:
        more: types of modules that normalise, besides those of torch; subclasses count.

    Returns:
        Two groups of (name, parameter) pairs; the second, of all other parameters, with ``perturb=False``.

    Raises:
        ValueError: if no parameter belongs to such a module.
    """
    kinds = (*NORMALIZATIONS, *more)
    chosen = {
        id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters(recurse=False)
    }
    named = list(model.named_parameters())
    normalizations = [(name, p) for name, p in named if id(p) in chosen]
    if not normalizations:
        raise ValueError("no parameter of the model belongs to a normalisation layer; name your own module types")
    others = [(name, p) for name, p in named if id(p) not in chosen]
    groups: list[dict[str, Any]] = [{"params": normalizations}]
    return [*groups, {"params": others, "perturb": False}] if others else groups
