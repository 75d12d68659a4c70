"""Which tensors one launch can walk over: those of the same types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..graphs import refuse_capture
from . import layout as at

# Triton's types by the codes of csrc/common/scalar_types.h.
_TYPES = (None, tl.float32, tl.float64, tl.bfloat16, tl.float16)


class Form(NamedTuple):
    """A form of a base optimizer's update, which kernels are compiled for.

    Attributes:
        variant: of the base.
        states: the numbers of its state tensors.
    """

    variant: int = 0
    states: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bucket:
    """Tensors of the same types, which one launch can walk over.

    Attributes:
        weights, copies, lists, state: Triton's types of the columns; ``copies`` differs from ``weights`` where the
            copies are masters, ``state`` is as long as the form of the update needs.
        form: of the base optimizer's update, where there is one.
        places: a word for each chunk, on the device.
        chunks: their number.
    """

    weights: Any
    copies: Any
    lists: tuple[Any, ...]
    state: tuple[Any, ...]
    form: Form
    places: Tensor
    chunks: int


class Buckets:
    """A plan's tensors, sorted by what a launch is compiled for.

    Args:
        numels: elements of each tensor.
        groups: each tensor's group.
        block: elements of a chunk.
        device: of the tensors.
    """

    def __init__(self, numels: Sequence[int], groups: Sequence[int], block: int, device: torch.device) -> None:
        self._numels, self._groups, self._block, self._device = numels, groups, block, device
        self._found: dict[Any, tuple[bytes, list[Bucket]]] = {}
        self._places: dict[tuple[int, ...], Tensor] = {}

    @property
    def places(self) -> list[Tensor]:
        """What launches so far have read: a captured graph needs it as long as it is replayed."""
        return list(self._places.values())

    def of(
        self,
        codes: bytes,
        lists: int,
        taken: bytearray | None,
        weights: bool = True,
        forms: tuple[Form, ...] | None = None,
    ) -> list[Bucket]:
        """The plan's tensors by what a launch is compiled for; at least one bucket.

        Args:
            codes: of the types of all cells of the table.
            taken: None for launches without a snapshot.
            weights: whether the launch reads them.
            forms: of the groups' updates, for launches that make them.
        """
        key = (lists, taken is None, weights, forms)
        found = self._found.get(key)
        if found is None or found[0] != codes:
            found = self._found[key] = (codes, self._make(codes, lists, taken is not None, weights, forms))
        return found[1]

    def _make(
        self, codes: bytes, lists: int, copies: bool, weights: bool, forms: tuple[Form, ...] | None
    ) -> list[Bucket]:
        # A cell that is empty takes the type that it has in other rows whose weights and copies are of the same types.
        usual: dict[tuple[int, int, int], int] = {}
        signatures = []
        for row in range(len(self._numels)):
            cells = codes[row * at.COLUMNS : (row + 1) * at.COLUMNS]
            own = cells[at.WEIGHT] if weights else 1
            copy = (cells[at.SNAPSHOT] if weights and copies else 0) or own
            form = Form() if forms is None else forms[self._groups[row]]
            columns = [*range(at.LIST, at.LIST + lists), *(at.STATE + number for number in form.states)]
            for column in columns:
                if cells[column]:
                    usual.setdefault((own, copy, column), cells[column])
            signatures.append((own, copy, form, cells, columns))
        members: dict[tuple[int, int, Form, tuple[int, ...]], list[int]] = {}
        for row, (own, copy, form, cells, columns) in enumerate(signatures):
            types = tuple(cells[c] or usual.get((own, copy, c), own) for c in columns)
            members.setdefault((own, copy, form, types), []).append(row)
        if not members:
            form = forms[0] if forms else Form()
            members = {(1, 1, form, (1,) * (lists + len(form.states))): []}
        buckets = []
        for (own, copy, form, types), rows in members.items():
            places = self._places_of(tuple(rows))
            buckets.append(
                Bucket(
                    _TYPES[own],
                    _TYPES[copy],
                    tuple(_TYPES[c] for c in types[:lists]),
                    tuple(_TYPES[c] for c in types[lists:]),
                    form,
                    places,
                    len(places),
                )
            )
        some = [b for b in buckets if b.chunks > 0]
        return some or buckets[:1]

    def _places_of(self, rows: tuple[int, ...]) -> Tensor:
        places = self._places.get(rows)
        if places is None:
            counts = torch.tensor(
                [-(-self._numels[row] // self._block) for row in rows], dtype=torch.int64, device="cpu"
            )
            firsts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
            numbers = torch.repeat_interleave(torch.tensor(rows, dtype=torch.int64, device="cpu"), counts)
            places = (numbers << 32) | (torch.arange(len(firsts), device="cpu") - firsts)
            places = self._places[rows] = self._sent(places)
        return places

    def _sent(self, words: Tensor) -> Tensor:
        """On the device, without waiting for it.

        Raises:
            RuntimeError: while a graph is captured: the words would be there only when it has been replayed.
        """
        if self._device.type != "cuda":
            return words
        refuse_capture(self._device, "the kernels have not walked over these tensors before")
        return words.pin_memory().to(self._device, non_blocking=True)
