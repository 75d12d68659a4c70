"""Every method, and a few whole steps of any of them."""

from __future__ import annotations

import copy
from typing import Any

from sam_optim import MGSERSAM, AgnosticSAM, TrainStep

from .cases import METHODS, Method
from .test_combined_gradient import METHODS as COMBINED
from .test_family import METHODS as FAMILY
from .test_variants import METHODS as VARIANTS

EVERY_METHOD = [*METHODS, *VARIANTS, *FAMILY, *COMBINED[7:], Method(AgnosticSAM, {"rho_train": 0.1, "smoothing": 0.5})]


def take_steps(step: TrainStep, batches: list[Any], others: list[Any]) -> None:
    """A step for each pair of batches; before the third the optimizer's state is saved and loaded."""
    optimizer = step.optimizer
    kind = "memory_batch" if isinstance(optimizer, MGSERSAM) else "validation_batch"
    for number, (batch, other) in enumerate(zip(batches, others, strict=True)):
        more = {}
        if number == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            more["previous_batch"] = batches[1]
        step(batch, **{kind: other}, **more)
    assert optimizer.last_step.updated
    repr(optimizer.last_step.ascent)
