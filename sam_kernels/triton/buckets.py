"""Which tensors one launch can walk over: those of the same types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..bases import AdamSettings, SGDSettings
from ..graphs import refuse_capture
from . import kernels
from . import layout as at

# Triton's types by the codes of csrc/common/scalar_types.h.
_TYPES = (None, tl.float32, tl.float64, tl.bfloat16, tl.float16)
# Tensors of state that a kind of update has.
_STATES = {kernels.PLAIN: 0, kernels.MOMENTUM: 1, kernels.NESTEROV: 1, kernels.ADAM: 2, kernels.AMSGRAD: 3}
_STATES = {kind.value: count for kind, count in _STATES.items()}


@dataclass(frozen=True)
class Bucket:
    """Tensors of the same types, which one launch can walk over.

    Attributes:
        weights, copies, lists, state: Triton's types of the columns; ``copies`` differs from ``weights`` where the
            copies are masters, ``state`` is as long as the base optimizer's kind needs.
        kind: of the base optimizer's update, 0 where there is none.
        places: a word for each chunk, on the device.
        chunks: their number.
    """

    weights: Any
    copies: Any
    lists: tuple[Any, ...]
    state: tuple[Any, ...]
    kind: int
    places: Tensor
    chunks: int


def kind_of(settings: SGDSettings | AdamSettings) -> int:
    """KIND of a base optimizer's update."""
    if isinstance(settings, AdamSettings):
        kind = kernels.AMSGRAD if settings.amsgrad else kernels.ADAM
    elif settings.momentum == 0.0:
        kind = kernels.PLAIN
    else:
        kind = kernels.NESTEROV if settings.nesterov else kernels.MOMENTUM
    return int(kind.value)


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
        kinds: tuple[int, ...] | None = None,
    ) -> list[Bucket]:
        """The plan's tensors by what a launch is compiled for; at least one bucket.

        Args:
            codes: of the types of all cells of the table.
            taken: None for launches without a snapshot.
            weights: whether the launch reads them.
            kinds: of the groups' updates, for launches that make them.
        """
        key = (lists, taken is None, weights, kinds)
        found = self._found.get(key)
        if found is None or found[0] != codes:
            found = self._found[key] = (codes, self._make(codes, lists, taken is not None, weights, kinds))
        return found[1]

    def _make(
        self, codes: bytes, lists: int, copies: bool, weights: bool, kinds: tuple[int, ...] | None
    ) -> list[Bucket]:
        # A cell that is empty takes the type that it has in other rows whose weights and copies are of the same types.
        usual: dict[tuple[int, int, int], int] = {}
        signatures = []
        for row in range(len(self._numels)):
            cells = codes[row * at.COLUMNS : (row + 1) * at.COLUMNS]
            own = cells[at.WEIGHT] if weights else 1
            copy = (cells[at.SNAPSHOT] if weights and copies else 0) or own
            kind = 0 if kinds is None else kinds[self._groups[row]]
            columns = [*range(at.LIST, at.LIST + lists), *range(at.STATE, at.STATE + _STATES[kind])]
            if kinds is None:
                columns = columns[:lists]
            for column in columns:
                if cells[column]:
                    usual.setdefault((own, copy, column), cells[column])
            signatures.append((own, copy, kind, cells, columns))
        members: dict[tuple[int, ...], list[int]] = {}
        for row, (own, copy, kind, cells, columns) in enumerate(signatures):
            signature = (own, copy, kind, *(cells[c] or usual.get((own, copy, c), own) for c in columns))
            members.setdefault(signature, []).append(row)
        members = members or {(1, 1, kinds[0] if kinds else 0, *[1] * (lists + 3)): []}
        buckets = []
        for (own, copy, kind, *rest), rows in members.items():
            places = self._places_of(tuple(rows))
            of_state = rest[lists : lists + _STATES[kind]] if kinds is not None else []
            buckets.append(
                Bucket(
                    _TYPES[own],
                    _TYPES[copy],
                    tuple(_TYPES[c] for c in rest[:lists]),
                    tuple(_TYPES[c] for c in of_state),
                    kind,
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
