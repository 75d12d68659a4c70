"""Tensor lists for the kernel tests, and the operations as functions of a backend."""

from __future__ import annotations

import mmap
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import sam_kernels as sk
from sam_kernels.bases import Base

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# (weights, gradients)
DTYPE_PAIRS = [(dtype, dtype) for dtype in DTYPES] + [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
]

NAN = float("nan")

# Of each base settings for every form of its update, and for every setting.
FORMS: dict[type[Base], list[Any]] = {
    sk.SGD: [
        sk.SGDSettings(0.1),
        sk.SGDSettings(0.1, weight_decay=0.01, maximize=True),
        sk.SGDSettings(0.1, momentum=0.9),
        sk.SGDSettings(0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
        sk.SGDSettings(0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
        sk.SGDSettings(0.0, momentum=0.9),
    ],
    sk.Adam: [
        sk.AdamSettings(0.01),
        sk.AdamSettings(0.01, weight_decay=0.1),
        sk.AdamSettings(0.01, weight_decay=0.1, decoupled=True, maximize=True),
        sk.AdamSettings(0.01, beta1=0.4, beta2=0.9, amsgrad=True),
        sk.AdamSettings(0.01, eps=1e-3, weight_decay=0.2, decoupled=True, amsgrad=True),
        sk.AdamSettings(0.0, weight_decay=0.1, decoupled=True),
    ],
    sk.Lion: [
        sk.LionSettings(0.01, weight_decay=0.1),
        sk.LionSettings(0.01, beta1=0.4, weight_decay=0.1, decoupled=False, maximize=True),
        sk.LionSettings(0.0, weight_decay=0.1),
    ],
    sk.RMSprop: [
        sk.RMSpropSettings(0.01, weight_decay=0.1),
        sk.RMSpropSettings(0.01, momentum=0.9, maximize=True),
        sk.RMSpropSettings(0.01, alpha=0.7, centered=True),
        sk.RMSpropSettings(0.01, weight_decay=0.1, momentum=0.5, centered=True),
        sk.RMSpropSettings(0.0, momentum=0.9),
    ],
}

# Of each base that with the most state.
FULLEST_FORMS = [
    (base, max(several, key=lambda settings, base=base: len(base.states(settings)))) for base, several in FORMS.items()
]
ALL_FORMS = [(base, settings) for base, several in FORMS.items() for settings in several]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Agreement of two backends: one rounding of the stored type, or a few of float32."""
    return {
        torch.float64: {"rtol": 1e-12, "atol": 1e-12},
        torch.float32: {"rtol": 2e-6, "atol": 1e-6},
        torch.bfloat16: {"rtol": 1e-2, "atol": 1e-3},
        torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    }[dtype]


def random_tensors(sizes: Sequence[int | tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(size,) if isinstance(size, int) else size for size in sizes]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@dataclass
class Problem:
    """Weights, three gradient lists and base state, to be copied for each backend."""

    params: list[Tensor]
    xs: list[list[Tensor | None]]
    geometry: list[float | None]
    groups: list[int]
    states: list[list[Tensor]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    @staticmethod
    def random(
        sizes: Sequence[int | tuple[int, ...]],
        weights: torch.dtype = torch.float32,
        gradients: torch.dtype | None = None,
        adaptive: bool = False,
        lists: int = 1,
        group_count: int = 2,
    ) -> Problem:
        gradients = gradients or weights
        count = len(sizes)
        # Second moments are not below the squares of first ones, and their maximum not below them.
        first = random_tensors(sizes, weights, 5)
        second = [(m * m + v.abs()).to(weights) for m, v in zip(first, random_tensors(sizes, weights, 6), strict=True)]
        return Problem(
            params=random_tensors(sizes, weights, 1),
            xs=[random_tensors(sizes, gradients, 2 + i) for i in range(lists)],
            geometry=[0.01 * (i % 3) if adaptive and i % 4 != 3 else None for i in range(count)],
            groups=[i % group_count for i in range(count)],
            states=[first, second, [t * 1.5 for t in second]],
            steps=[torch.tensor(float(i % 5)) for i in range(count)],
        )

    def copy(self) -> Problem:
        return Problem(
            [t.clone() for t in self.params],
            [[None if t is None else t.clone() for t in x] for x in self.xs],
            list(self.geometry),
            list(self.groups),
            [[t.clone() for t in column] for column in self.states],
            [t.clone() for t in self.steps],
        )

    def to(self, device: torch.device | str) -> Problem:
        """A copy with everything on another device."""
        own = self.copy()
        for column in (own.params, *own.xs, *own.states, own.steps):
            column[:] = [None if t is None else t.to(device) for t in column]
        return own

    def plan(self) -> sk.Plan:
        return sk.Plan(self.params, self.groups, self.geometry)

    def base(self, cls: type[Base], settings: Any, first: bool = False) -> Base:
        """A base with these settings, and with a learning rate for each group.

        Args:
            first: whether its state is new.
        """
        per_group = [settings._replace(lr=settings.lr * (g + 1)) for g in range(max(self.groups) + 1)]
        for number in range(len(cls.state_keys)) if first else ():
            self.states[number] = [torch.zeros_like(t) for t in self.states[number]]
        own: dict[str, Any] = dict(zip(cls.state_keys, self.states, strict=False))
        if cls.counts_steps:
            own["step"] = self.steps
        if cls.marks_first:
            own["first"] = bytearray([int(first)] * len(self.params))
        return cls(per_group, **own)

    def sgd(self, first: bool = False, **settings: float) -> sk.SGD:
        per_group = [sk.SGDSettings(**{"lr": 0.1 * (g + 1), **settings}) for g in range(max(self.groups) + 1)]
        buffers = [torch.zeros_like(t) for t in self.states[0]] if first else self.states[0]
        self.states[0] = buffers
        return sk.SGD(per_group, buffers, bytearray([int(first)] * len(self.params)))

    def adam(self, **settings: float) -> sk.Adam:
        per_group = [sk.AdamSettings(**{"lr": 0.01 * (g + 1), **settings}) for g in range(max(self.groups) + 1)]
        return sk.Adam(per_group, *self.states, self.steps)

    def tensors(self) -> list[Tensor]:
        return [*self.params, *(t for column in self.states for t in column), *self.steps]


def poisoned_snapshot(plan: sk.Plan) -> sk.Snapshot:
    """A snapshot whose memory holds NaN, so that a copy that was not taken shows."""
    snapshot = sk.Snapshot(plan)
    for tensor in snapshot.tensors:
        tensor.fill_(NAN)
    return snapshot


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of every bit: -0 differs from 0, and a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def assert_backends_agree(
    problem: Problem, run: Callable[[Problem, str], object], backend: str = "cpu", device: torch.device | str = "cpu"
) -> None:
    """Runs ``run(problem, backend)`` on copies of the problem and compares everything it may have written."""
    wanted, got = problem.copy(), problem.to(device)
    run(wanted, "reference")
    run(got, backend)
    for a, b in zip(got.tensors(), wanted.tensors(), strict=True):
        a = a.cpu()
        assert torch.isfinite(a).all() == torch.isfinite(b).all()
        torch.testing.assert_close(a, b, **tolerance(a.dtype), equal_nan=True)


def at_a_low_address(values: Tensor) -> Tensor:
    """A copy whose address fits in 31 bits, as those of a program that is linked to fixed addresses may.

    On other systems than Linux on x86-64 at any address.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux" and platform.machine() == "x86_64":
        flags |= 0x40  # MAP_32BIT
    memory = mmap.mmap(-1, max(1, values.nbytes), flags=flags)
    return torch.frombuffer(memory, dtype=values.dtype, count=values.numel()).view(values.shape).copy_(values)
