"""Tensors that are spread over ranks: the part that this rank holds, and sums over those that hold the others.

A DTensor, as FSDP2 and tensor parallelism make of parameters, gradients and optimizer state, is its local tensor to the
kernels. What they do to elements needs no other rank; a Gram matrix is summed over the ranks that hold other parts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedTensorError


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. Does not import them where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Any, like: Any = None, name: str = "a tensor") -> Any:
    """What this rank holds of a DTensor, the very memory; any other tensor as it is.

    Args:
        like: the DTensor whose placements this one must have.

    Raises:
        UnsupportedTensorError: if its parts are not those of ``like``, or are summands that were not added yet.
    """
    if not is_distributed(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnsupportedTensorError(
            f"{name} is a DTensor with partial sums ({tensor.placements}); redistribute it before the step"
        )
    if like is not None and is_distributed(like) and tensor.placements != like.placements:
        raise UnsupportedTensorError(
            f"{name} is a DTensor placed as {tensor.placements}, but its parameter as {like.placements}; "
            "redistribute it before the step"
        )
    return tensor._local_tensor


@dataclass(frozen=True)
class Share:
    """Tensors whose other parts the same ranks hold.

    Attributes:
        index: of the tensors.
        groups: process groups to sum over, one after the other; none where every rank has the whole.
    """

    index: list[int]
    groups: list[Any]

    def sum(self, matrix: Tensor) -> Tensor:
        """The sum over all ranks that hold parts; in place. Ranks whose parts are empty take part too."""
        for group in self.groups:
            torch.distributed.all_reduce(matrix, group=group)
        return matrix


def shares_of(tensors: Sequence[Any]) -> list[Share]:
    """The tensors by who holds their other parts, in the same order on every rank; empty if none is a DTensor."""
    found: dict[Any, Share] = {}
    some = False
    for number, tensor in enumerate(tensors):
        key: Any = None
        groups: list[Any] = []
        if is_distributed(tensor):
            some = True
            mesh = tensor.device_mesh
            # Along a dimension where the tensor is replicated, every rank has the same.
            sharded = tuple(d for d, placement in enumerate(tensor.placements) if placement.is_shard())
            key = (mesh, sharded)
            groups = [mesh.get_group(d) for d in sharded]
        found.setdefault(key, Share([], groups)).index.append(number)
    return list(found.values()) if some else []
