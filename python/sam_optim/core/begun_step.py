"""A method's step under way: its generator, what it waits for, and the gradients collected for it."""

from __future__ import annotations

from collections.abc import Sequence
from types import GeneratorType
from typing import Any, NoReturn

from torch import Tensor

from .errors import StepOrderError
from .passes import Gradients, Pass, Passes, Update


class _Overwritten:
    """Takes the place of a gradient that its method did not ask to keep, once ``p.grad`` may be written into again."""

    @classmethod
    def refuse(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise StepOrderError(
            "passes() reads a gradient after it has asked for another one, which may have been written over it: yield "
            "Pass(kept=True) for a gradient that is needed again"
        )

    # Whatever torch is asked to do with it.
    __torch_function__ = refuse

    def __getattr__(self, name: str) -> NoReturn:
        self.refuse()


OVERWRITTEN: Any = _Overwritten()


def refuse_overwritten(lists: Sequence[Gradients]) -> None:
    """Raises :class:`StepOrderError` if a method hands over a gradient that it did not ask to keep."""
    for gradients in lists:
        if gradients and gradients[0] is OVERWRITTEN:
            _Overwritten.refuse()


class Unwritten:
    """Records gradients, to tell later whether somebody has written into them."""

    def __init__(self, gradients: Gradients) -> None:
        self.gradients = gradients
        self._versions = versions_of(gradients)

    def check(self, which: str) -> None:
        """Raises :class:`StepOrderError` if they have changed.

        Args:
            which: what gradients these are, for the message.
        """
        if versions_of(self.gradients) != self._versions:
            raise StepOrderError(
                f"the gradient of {which} is needed again, but was written into since: p.grad was assigned the same "
                "tensors for another pass. Assign new ones for each, p.grad = g.clone()"
            )


def _is_lent(gradient: Tensor) -> bool:
    """Whether somebody else may write into its memory in the next pass, and torch would not count that.

    Views are of DistributedDataParallel's buckets. What torch has not allocated is numpy's, or a CUDA graph's.
    """
    return gradient._is_view() or (type(gradient) is Tensor and not gradient.untyped_storage().resizable())


def versions_of(gradients: Gradients) -> list[int]:
    """How often each tensor was written into; tensors made in inference mode do not count that."""
    try:
        return [-1 if g is None else g._version for g in gradients]
    except RuntimeError:
        return [-1 if g is None or g.is_inference() else g._version for g in gradients]


class BegunStep:
    """A step under way: the method's generator, what it waits for, and the gradients collected for it.

    Attributes:
        passes: the generator.
        number: how many gradients were received.
        expected: the passes that it has yielded together.
        waiting: the one whose gradients are wanted next; None if the method waits for its update, and at the end.
        update: the update that it waits for.
        last: the gradients received last, and whether the method keeps them.
    """

    waiting: Pass | None
    update: Update | None

    def __init__(self, passes: Passes, method: str) -> None:
        """Begins the step of the method of this name.

        Raises:
            StopIteration: if it needs no gradient.
            TypeError: if ``passes()`` is not a generator, or yields anything but passes and an update.
            StepOrderError: if it yields them in an order that no driver can follow.
        """
        if not isinstance(passes, GeneratorType):
            raise TypeError(
                f"passes() of {method} returned {type(passes).__name__}: it has to be a generator, which yields its "
                "passes, g = yield Pass(), and then its Update"
            )
        self.passes, self._method = passes, method
        self.number = 0
        self._kept: list[tuple[int, Unwritten]] = []
        self.expected: list[Pass] = []
        self.last: tuple[Gradients, bool] = [], False
        self._take(next(passes))

    def receive(self, gradients: Gradients) -> bool:
        """Takes the gradients of the pass that is waiting. False if the step is over.

        Raises:
            StepOrderError: if a gradient that the method keeps was written into, for instance because all passes
                assign the same tensor to ``p.grad``.
        """
        for number, before in self._kept:
            before.check(f"pass {number}")
        is_kept = self.waiting is not None and self.waiting.kept
        if is_kept:
            gradients = [g.clone() if g is not None and _is_lent(g) else g for g in gradients]
        self.last = gradients, is_kept
        self.number += 1
        if is_kept:
            self._kept.append((self.number, Unwritten(gradients)))
        if not self._together:
            return self._send(gradients)
        self._collected.append(gradients)
        if len(self._collected) == len(self.expected):
            return self._send(self._collected)
        self.waiting = self.expected[len(self._collected)]
        return True

    def go_on(self) -> bool:
        """Continues the method after its update. Returns False, since the step is then over.

        Raises:
            StepOrderError: if the method yields anything more.
        """
        try:
            asked = self.passes.send(None)
        except StopIteration:
            self.waiting = self.update = None
            return False
        raise StepOrderError(
            f"passes() of {self._method} yields {_named(asked)} after its Update, which is the last thing of a step; "
            "that update has been made. Yield one Update, of all gradients together, after the last pass"
        )

    def _send(self, answer: Any) -> bool:
        try:
            self._take(self.passes.send(answer))
        except StopIteration:
            self.waiting = self.update = None
            return False
        return True

    def _take(self, asked: Any) -> None:
        self._together = False
        self.update = None
        if isinstance(asked, Update):
            self.waiting, self.update = None, asked
            return
        if self.expected and self.expected[-1].last:
            raise StepOrderError(
                f"passes() of {self._method} yields {_named(asked)} after a pass that it said was the last: say "
                "last=True of the pass that its Update follows"
            )
        gradients, is_kept = self.last
        if not is_kept:
            gradients[:] = [OVERWRITTEN] * len(gradients)
        if isinstance(asked, Pass):
            self.waiting, self.expected = asked, [asked]
            return
        if not isinstance(asked, (list, tuple)) or not all(isinstance(p, Pass) for p in asked):
            raise TypeError(
                f"passes() of {self._method} yields {_named(asked)}; it may yield Pass, [Pass, ...] and Update"
            )
        if not asked:
            raise StepOrderError(
                f"passes() of {self._method} yields an empty list; leave it out where no Pass is wanted"
            )
        if not all(p.kept or p.weights is not None for p in asked[:-1]):
            raise StepOrderError(
                f"passes() of {self._method} yields several passes together, and each but the last has to be kept: "
                "most drivers run one after the other. Yield [Pass(kept=True), ...]"
            )
        self._together, self.expected = True, list(asked)
        self.waiting = self.expected[0]
        self._collected: list[Gradients] = []


def _named(asked: Any) -> str:
    kind = type(asked).__name__
    return f"another {kind}" if isinstance(asked, Update) else f"a {kind}" if isinstance(asked, Pass) else repr(asked)
