"""What a method asks of whoever runs its gradient passes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sam_kernels.rules import Fixed, RuleLike
from sam_kernels.scales import Scale

Gradients = list[Tensor | None]

TRAIN = "train"
VALIDATION = "validation"
PREVIOUS = "previous"
MEMORY = "memory"


@dataclass(frozen=True)
class Pass:
    """One gradient evaluation.

    Attributes:
        data: which batch: ``"train"``; ``"validation"`` for methods that use a second one; ``"previous"`` for the
            training batch of the step before; ``"memory"`` for a batch of samples of earlier tasks.
        perturbed: the model holds perturbed weights. Such a pass uses the random draws of the unperturbed pass on the
            same data (dropout), and leaves BatchNorm's running statistics alone.
        may_be_empty: there may be no such batch; the pass then leaves no gradients.
        kept: the method reads this gradient again after later passes, so that ``p.grad`` must not be written into
            before the step ends. Whoever runs the passes takes the gradients away from the parameters.
        last: no pass follows in this step: what ``p.grad`` holds then, the base optimizer's update is made from, alone
            or with gradients of earlier passes. Methods have to say so for drivers that leave the update to somebody
            else's ``step()``.
        weights: where to take the gradient: a tensor for each parameter; None for where the model's weights are. Only
            of passes yielded together, to a driver that runs them side by side.
    """

    data: str = TRAIN
    perturbed: bool = False
    kept: bool = False
    may_be_empty: bool = False
    last: bool = False
    weights: Sequence[Tensor] | None = None

    @property
    def updates_statistics(self) -> bool:
        """Whether running statistics are to learn from this pass: once a step from each batch that is trained on."""
        return not self.perturbed and self.data in (TRAIN, MEMORY)


class PassGroup:
    """Passes that do not depend on each other.

    Attributes:
        passes: one or more.
        gradients: of each pass, an entry for each parameter; to be filled by whoever runs them.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = passes
        self.gradients: Sequence[Gradients] = ()


class Update:
    """The base optimizer's update, of the weights themselves: what a method yields once it has all gradients.

    Args:
        *lists: gradient lists; the update takes sum_i scale_i c_i x_i.
        rule: makes the coefficients c of the lists' Gram matrix; ones by default.
        scale: a number, or one for each group and list.
    """

    def __init__(self, *lists: Gradients, rule: RuleLike | None = None, scale: Scale = 1.0) -> None:
        self.lists, self.scale = lists, scale
        self.rule: RuleLike = Fixed() if rule is None else rule

    @property
    def is_one_gradient(self) -> bool:
        """Whether it takes a single list as it is."""
        return len(self.lists) == 1 and self.rule == Fixed() and isinstance(self.scale, float) and self.scale == 1.0


# A method yields a pass and is sent its gradients, one entry for each parameter, None where there is none. Or it yields
# several passes that do not depend on each other, and is sent a list of as many gradients. Last comes the update.
Passes = Generator[Pass | Sequence[Pass] | Update, Any, None]


class BegunStep:
    """A step under way: the method's generator, what it waits for, and the gradients collected for it.

    Attributes:
        passes: the generator.
        number: of gradients received.
        expected: the passes that it has yielded together.
        waiting: the one of them whose gradients are wanted next; None where it waits for its update, and after its end.
        update: which then stands here.
        last: the gradients received last, and whether the method keeps them.
    """

    waiting: Pass | None
    update: Update | None

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.number = 0
        self.last: tuple[Gradients, bool] = [], False
        self._take(next(passes))

    def receive(self, gradients: Gradients) -> bool:
        """Takes the gradients of the pass that is waiting. False if the step is over."""
        is_kept = self.waiting is not None and self.waiting.kept
        if is_kept:
            # Views are of memory that somebody else writes into: DistributedDataParallel's buckets, in the next pass.
            gradients = [g.clone() if g is not None and g._is_view() else g for g in gradients]
        self.last = gradients, is_kept
        self.number += 1
        if not self._together:
            return self._send(gradients)
        self._collected.append(gradients)
        if len(self._collected) == len(self.expected):
            return self._send(self._collected)
        self.waiting = self.expected[len(self._collected)]
        return True

    def go_on(self) -> bool:
        """After the update has been made. False if the step is over."""
        return self._send(None)

    def _send(self, answer: Any) -> bool:
        try:
            self._take(self.passes.send(answer))
        except StopIteration:
            self.waiting = self.update = None
            return False
        return True

    def _take(self, asked: Pass | Sequence[Pass] | Update) -> None:
        self._together = False
        self.update = None
        if isinstance(asked, Pass):
            self.waiting, self.expected = asked, [asked]
        elif isinstance(asked, Update):
            self.waiting, self.update = None, asked
        else:
            self._together, self.expected = True, list(asked)
            self.waiting = self.expected[0]
            self._collected: list[Gradients] = []
