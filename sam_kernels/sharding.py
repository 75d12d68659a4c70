"""Models that are spread over ranks: what this rank holds of them, and sums over those that hold the rest.

A DTensor, as FSDP2 and tensor parallelism make of parameters, gradients and optimizer state, is its local tensor to the
kernels. What they do to elements needs no other rank; a Gram matrix is summed over the ranks that hold other parts. Of
plain tensors nobody can see that others hold more of the model (stages of a pipeline, experts): :class:`Peers` says it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedTensorError

__all__ = ["Peers", "is_distributed", "is_flat_shard", "local_part"]


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. Does not import them where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_flat_shard(tensor: Any) -> bool:
    """Whether a tensor belongs to ``FullyShardedDataParallel``, FSDP 1: a flat parameter, or a part of one.

    To the optimizer it is a plain tensor that holds what its rank has of it.
    """
    return bool(getattr(tensor, "_fsdp_flattened", False))


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


@dataclass(frozen=True)
class Peers:
    """Ranks that hold other tensors of the same model, or other parts that are not DTensors.

    Attributes:
        group: their process group; Gram matrices are summed over it.
        counted: for each tensor of a plan whether this rank counts it. Of a tensor that several of the ranks hold, one
            has to.
    """

    group: Any
    counted: Sequence[bool]

    def without_uncounted(self, column: Sequence[Any]) -> Sequence[Any]:
        """The entries of a gradient list that this rank counts, None in place of the others."""
        if all(self.counted):
            return column
        return [entry if counted else None for entry, counted in zip(column, self.counted, strict=True)]

    def sum(self, matrix: Tensor) -> Tensor:
        """The sum over all ranks; in place."""
        torch.distributed.all_reduce(matrix, group=self.group)
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
