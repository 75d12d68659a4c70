"""Memories and losses of continual learning, for :class:`MGSERSAM` and for experience replay with any method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..core.checks import whole_number


class ReservoirMemory:
    """A uniform sample of all samples seen so far (reservoir sampling, Vitter 1985, algorithm R).

    A sample is a row of each of one or more tensors: inputs, labels, and for dark experience replay the logits that the
    model gave when the sample was added.

    Args:
        capacity: samples kept at most; at least 1.
        seed: of the memory's own random generator, so that it takes no draws from the training's.
        device: where the samples are kept; by default where the first ones are.

    Attributes:
        seen: samples added so far.

    Raises:
        InvalidSettingError: for a capacity that is no whole number of at least 1.
    """

    def __init__(self, capacity: int, *, seed: int = 0, device: torch.device | str | None = None) -> None:
        self.capacity, self.seen = whole_number("capacity", capacity, 1), 0
        self._device = None if device is None else torch.device(device)
        self._columns: list[Tensor] = []
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    # What is kept and drawn is for autograd, also where logits were computed in inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, *columns: Tensor) -> None:
        """Offers a batch to the memory: sample n of all (counted from 0) gets slot n while there are free ones, and
        afterwards slot r, drawn uniformly from 0 to n, if that is a slot.

        Args:
            columns: tensors whose first dimension is the batch's; as many, and of the same types and shapes, each time.

        Raises:
            TypeError: for something else than tensors.
            ValueError: if they are not.
        """
        for column in columns:
            if not isinstance(column, Tensor):
                raise TypeError(
                    f"a memory keeps tensors, got a {type(column).__name__}: hand them over one by one, always in the "
                    "same order, as add(x, y), add(*pair) or add(batch['x'], batch['y'])"
                )
        if not columns or any(c.dim() == 0 or len(c) != len(columns[0]) for c in columns):
            raise ValueError(f"a batch needs tensors of one length, got shapes {[tuple(c.shape) for c in columns]}")
        if not self._columns:
            device = self._device or columns[0].device
            self._columns = [torch.zeros(self.capacity, *c.shape[1:], dtype=c.dtype, device=device) for c in columns]
        kinds = [(own.shape[1:], own.dtype) for own in self._columns]
        if [(c.shape[1:], c.dtype) for c in columns] != kinds:
            raise ValueError(
                f"this memory holds samples of (shape, dtype) {[(tuple(s), d) for s, d in kinds]}, "
                f"got {[(tuple(c.shape[1:]), c.dtype) for c in columns]}"
            )
        slots: dict[int, int] = {}  # a later sample takes the place of an earlier one
        for row in range(len(columns[0])):
            slot = self.seen
            if slot >= self.capacity:
                slot = int(torch.randint(self.seen + 1, (), generator=self._generator, device="cpu"))
            if slot < self.capacity:
                slots[slot] = row
            self.seen += 1
        if slots:
            for own, column in zip(self._columns, columns, strict=True):
                rows = torch.tensor(list(slots.values()), device=column.device)
                own[torch.tensor(list(slots), device=own.device)] = column.detach()[rows].to(own.device)

    @torch.inference_mode(False)
    def sample(self, count: int) -> tuple[Tensor, ...]:
        """Up to ``count`` different samples, drawn uniformly: a tensor for each column.

        Raises:
            ValueError: if the memory is empty, or ``count`` is not positive.
        """
        count = whole_number("count", count, 1)
        if len(self) == 0:
            raise ValueError(f"cannot draw {count} samples from a memory of 0")
        drawn = torch.randperm(len(self), generator=self._generator, device="cpu")[:count]
        return tuple(own[drawn.to(own.device)] for own in self._columns)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on as this one would."""
        return {
            "capacity": self.capacity,
            "seen": self.seen,
            "columns": [own.clone() for own in self._columns],
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the place of all samples.

        Raises:
            ValueError: if the state is that of a memory of another capacity.
        """
        if state_dict["capacity"] != self.capacity:
            raise ValueError(f"the state is of a memory of {state_dict['capacity']} samples, not {self.capacity}")
        self.seen = state_dict["seen"]
        self._columns = [own.to(self._device or own.device, copy=True) for own in state_dict["columns"]]
        # torch.load(map_location="cuda") moves it with the samples.
        self._generator.set_state(state_dict["generator"].cpu())


def dark_experience_loss(
    logits: Tensor,
    stored_logits: Tensor,
    *,
    alpha: float = 0.5,
    labelled_logits: Tensor | None = None,
    labels: Tensor | None = None,
    beta: float = 0.5,
) -> Tensor:
    """The memory's loss of dark experience replay (Buzzega et al. 2020, arXiv 2004.07211).

    DER is ``alpha * MSE(logits, stored_logits)``; DER++ adds ``beta * cross_entropy(labelled_logits, labels)`` for a
    second, independent draw from the memory.

    Args:
        logits: of the model now, for a draw from the memory; shape (n, classes).
        stored_logits: of the same samples when they were added; same shape.
        labelled_logits, labels: of the second draw; shapes (m, classes) and (m,). Without them the loss is DER's.

    Returns:
        A scalar; both parts are means.

    Raises:
        ValueError: for labels without logits of their samples or the reverse, or stored logits of another shape.
    """
    if (labelled_logits is None) != (labels is None):
        given, missing = ("labels", "labelled_logits") if labelled_logits is None else ("labelled_logits", "labels")
        raise ValueError(f"{given} were given without {missing}: DER++ needs both, DER none of them")
    if logits.shape != stored_logits.shape:
        raise ValueError(
            f"logits have the shape {tuple(logits.shape)}, and stored_logits {tuple(stored_logits.shape)}: if the "
            "model has got new outputs since, compare those that it had, logits[:, : stored_logits.shape[1]]"
        )
    loss = alpha * functional.mse_loss(logits, stored_logits)
    if labelled_logits is not None and labels is not None:
        loss = loss + beta * functional.cross_entropy(labelled_logits, labels)
    return loss
