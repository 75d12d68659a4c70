"""A stand-in for a device without float64, such as Apple's GPUs.

Its tensors compute on the CPU and say that they are on a device of torch's type "meta", which otherwise holds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import sam_kernels.layouts
from sam_kernels.backends import reference

DEVICE = torch.device("meta")


class LittleTensor(Tensor):
    """A tensor on the device; ``values`` are its elements on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> LittleTensor:
        if values.dtype in (torch.float64, torch.complex128):
            raise TypeError("this device has no float64")
        result: LittleTensor = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=DEVICE
        )
        result.values = values
        return result

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LittleTensor({self.values})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Catches what has no tensor of the device among its arguments: factories."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


def _compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    from_device = any(isinstance(leaf, LittleTensor) for leaf in tree_leaves((args, kwargs)))
    to = kwargs.get("device")
    if to is not None:
        kwargs = {**kwargs, "device": "cpu"}
    stays = from_device if to is None else torch.device(to) == DEVICE
    result = function(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if function._schema.is_mutable:
        return args[0] if isinstance(result, Tensor) else result
    return tree_map(lambda leaf: LittleTensor(leaf) if isinstance(leaf, Tensor) else leaf, result) if stays else result


def _unwrapped(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, LittleTensor) else leaf


@contextmanager
def little_device() -> Iterator[None]:
    """Within it the device is there."""
    reference.has_float64.cache_clear()
    with _Dispatch(), patch.object(sam_kernels.layouts, "has_own_memory", lambda tensor: True):
        yield
    reference.has_float64.cache_clear()


def moved(tensor: Tensor) -> LittleTensor:
    """A copy on the device."""
    return LittleTensor(tensor.detach().clone())


def moved_module(module: nn.Module) -> nn.Module:
    """The module itself, with its parameters and buffers on the device."""
    for owner in module.modules():
        for name, param in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(moved(param)))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, moved(buffer))
    return module


def brought_back(tensor: Tensor) -> Tensor:
    """On the CPU."""
    return _unwrapped(tensor.detach())  # type: ignore[no-any-return]
