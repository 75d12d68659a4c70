"""Tensors that share memory: which launches must work on them one after the other, and what cannot work at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bases import Base, TensorList
from .errors import UnsupportedTensorError
from .layouts import is_dense, is_overlapping, offsets_of
from .plan import Plan
from .snapshot import MASTER, TAKEN, Snapshot

__all__ = ["sharing"]

_WEIGHT, _STATE, _LIST = range(3)


class _Piece(NamedTuple):
    """The memory of one tensor of a launch, as addresses in bytes within one space."""

    space: int
    begin: int
    end: int
    kind: int
    row: int
    tensor: Tensor


def extent_of(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of what follows its last; both 0 if it has no elements."""
    if tensor.numel() == 0:
        return 0, 0
    begin = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _place_of(tensor: Tensor) -> tuple[int, int, int]:
    """Space, begin and end. Devices that give no addresses have a space for each storage."""
    begin, end = extent_of(tensor)
    if tensor.data_ptr() != 0:
        return 0, begin, end
    offset = int(tensor.storage_offset()) * tensor.element_size()
    return tensor.untyped_storage()._cdata, begin + offset, end + offset


def shares_memory(
    plan: Plan,
    xs: Sequence[TensorList] = (),
    base: Base | None = None,
    snapshot: Snapshot | None = None,
    is_sum: bool = False,
) -> bool:
    """Whether weights, or state of a base, that a launch writes share memory with each other.

    Args:
        is_sum: every weight is written, and may be an entry of the lists, see :func:`sam_kernels.combine_`.

    Raises:
        ValueError: if a gradient lies in memory that is written, or two weights that share memory have masters.
        UnsupportedTensorError: if what is written is expanded.
    """
    taken = b"" if snapshot is None else bytes(snapshot.taken)
    columns = [*xs, *(() if base is None else (*base.columns, base.steps))]
    # A step's launches take turns, each with the same memory as in the step before.
    kind = len(xs), base is not None, TAKEN in taken, is_sum
    key = [_signature(column) for column in (plan.tensors, *columns)], taken
    found = plan.memory.get(kind)
    if found is None or found[0] != key:
        masters = bytes(flag & MASTER for flag in taken)
        found = key, _is_shared(plan, _pieces(plan, xs, base, snapshot, is_sum), masters, is_sum)
        plan.memory[kind] = found
    return found[1]


def _signature(tensors: Sequence[Tensor | None]) -> list[Any]:
    """What tells where tensors lie; quick, because every launch of some backends asks."""
    return [None if t is None else (t.data_ptr() or _place_of(t), t.stride(), t.dtype, t.numel()) for t in tensors]


def _is_shared(plan: Plan, pieces: list[_Piece], masters: bytes, is_sum: bool) -> bool:
    for piece in pieces:
        if piece.kind != _LIST and is_overlapping(piece.tensor):
            what = plan.names[piece.row] if piece.kind == _WEIGHT else f"the state of {plan.names[piece.row]}"
            raise UnsupportedTensorError(
                f"{what} is expanded: several of its elements are one number in memory, so that none can be written by "
                "itself; make it of tensor.clone()"
            )
    found = False
    open_pieces: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.space, piece.begin)):
        open_pieces = [other for other in open_pieces if other.space == piece.space and other.end > piece.begin]
        for other in open_pieces:
            if piece.kind == other.kind == _LIST or not _has_common_element(piece, other):
                continue
            if _LIST in (piece.kind, other.kind):
                written, gradient = (other, piece) if piece.kind == _LIST else (piece, other)
                if _is_same(written, gradient) and (is_sum or written.kind == _STATE):
                    continue  # read before it is written, element by element
                if not is_sum:
                    raise _gradient_error(plan, written, gradient)
            elif piece.kind == other.kind == _WEIGHT and masters and masters[other.row] and masters[piece.row]:
                names = f"{plan.names[other.row]} and {plan.names[piece.row]}"
                raise ValueError(
                    f"{names} share memory, and each would have a master of its own, so that one of two updates would "
                    "be lost; with master_weights give the optimizer each weight once"
                )
            found = True
        open_pieces.append(piece)
    return found


def sharing(plan: Plan) -> tuple[str, str] | None:
    """Names of two parameters that share memory, None if none do."""
    open_pieces: list[_Piece] = []
    for piece in sorted(_pieces(plan, [], None, None, True), key=lambda piece: (piece.space, piece.begin)):
        open_pieces = [other for other in open_pieces if other.space == piece.space and other.end > piece.begin]
        for other in open_pieces:
            if _has_common_element(piece, other):
                return plan.names[other.row], plan.names[piece.row]
        open_pieces.append(piece)
    return None


def _pieces(
    plan: Plan, xs: Sequence[TensorList], base: Base | None, snapshot: Snapshot | None, all_rows: bool
) -> list[_Piece]:
    """What a launch reads or writes, but for copies, which lie in memory of this package."""
    pieces: list[_Piece] = []

    def add(kind: int, row: int, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.numel() > 0:
            pieces.append(_Piece(*_place_of(tensor), kind, row, tensor))

    for row, weight in enumerate(plan.tensors):
        has_entry = any(x[row] is not None for x in xs)
        if all_rows or has_entry or (snapshot is not None and snapshot.taken[row]):
            add(_WEIGHT, row, weight)
        if has_entry and base is not None:
            for column in (*base.columns, base.steps):
                add(_STATE, row, column[row] if column else None)
        for x in xs:
            add(_LIST, row, x[row])
    return pieces


def _is_same(written: _Piece, read: _Piece) -> bool:
    """Whether both are the same elements of the same parameter."""
    return (
        written.row == read.row
        and (written.space, written.begin) == (read.space, read.begin)
        and written.tensor.dtype == read.tensor.dtype
        and written.tensor.stride() == read.tensor.stride()
    )


def _gradient_error(plan: Plan, written: _Piece, gradient: _Piece) -> ValueError:
    what = plan.names[written.row] if written.kind == _WEIGHT else f"the state of {plan.names[written.row]}"
    return ValueError(
        f"the gradient of {plan.names[gradient.row]} shares memory with {what}, which the step writes: it would change "
        "while it is used; let p.grad be a clone()"
    )


def _has_common_element(one: _Piece, other: _Piece) -> bool:
    """Whether two tensors whose ranges of memory overlap share an element: views may lie between each other's."""
    a, b = one.tensor, other.tensor
    if is_dense(a) and is_dense(b):
        return True
    size = a.element_size()
    if b.element_size() != size or (one.begin - other.begin) % size != 0:
        return True
    behind = (other.begin - one.begin) // size
    return bool(torch.isin(offsets_of(a), offsets_of(b) + behind).any())
