"""SAM-ON: parameter groups by the modules that parameters belong to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..core.construction import BaseOptimizer
from .sam import SAM

# BatchNorm, SyncBatchNorm and InstanceNorm are _NormBase.
NORMALIZATIONS: tuple[type[nn.Module], ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def sam_on(
    model: nn.Module,
    base_optimizer: BaseOptimizer,
    rho: float | Tensor = 0.5,
    *,
    normalizations: Iterable[type[nn.Module]] = (),
    **settings: Any,
) -> SAM:
    """SAM-ON (Mueller et al. 2023, arXiv 2306.04226): :class:`SAM` that perturbs normalisation layers only.

    ::

        optimizer = sam_on(model, torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)

    It is SAM on groups that :func:`perturb_normalization_only` makes. These groups also work with other methods.

    Args:
        model: the model to train. The module that a parameter belongs to decides whether it is perturbed.
        rho: 0.5, the default of the authors' code; fewer parameters need a larger rho than all of them.
        normalizations: types of modules that normalise, besides those of torch, with their subclasses.
        **settings: settings of :class:`SAM` and of the base optimizer. ``adaptive=True`` makes it ASAM-ON.

    Raises:
        ValueError: if no parameter belongs to such a module.
    """
    return SAM(perturb_normalization_only(model, *normalizations), base_optimizer, rho, **settings)


def perturb_normalization_only(model: nn.Module, *more: type[nn.Module]) -> list[dict[str, Any]]:
    """Groups for :func:`sam_on`, and for any other method that is to perturb only normalisation layers.

    ::

        optimizer = GSAM(perturb_normalization_only(model), torch.optim.SGD, rho=0.5, lr=0.1)

    Parameters are chosen by the type of their module, not by their names.

    Args:
        more: types of modules that normalise, besides those of torch, with their subclasses.

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
