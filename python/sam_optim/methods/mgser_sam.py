"""MGSER-SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON, NormalizedSum

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.passes import MEMORY, Pass, Passes, Update
from ..core.settings import Adaptive, Number, handed_on
from .sam import SAM


class MGSERSAM(SAM):
    """MGSER-SAM: memory-guided soft experience replay with SAM, for continual learning (arXiv 2405.09492).

    ::

        g   = gradient of L_t + L_s at w            L_t: loss on the current task's batch
        g_m = gradient of L_s at w                  L_s: loss on a batch from memory, with soft labels
        e   = rho g / |g|
        w  <- base_optimizer(w, gradient of L_t + L_s at w + e, + mu g_m)

    The memory's gradient at the unperturbed weights keeps the perturbations of task and memory from working against
    each other. No code of the authors is public; this is our reading of the paper's abstract and of summaries of it.

    There are two batches and two losses. The pass named ``"memory"`` is on a batch from memory, with the memory's loss,
    such as :func:`dark_experience_loss`. :class:`ReservoirMemory` is such a memory. While it is empty, compute nothing
    in that pass; the step is then a SAM step on the current batch. With rho and mu 0 the method is the base optimizer
    on L_t + L_s: plain experience replay.

    Args:
        mu: weight of the memory's gradient at the unperturbed weights; at least 0. Groups may have their own.
        all others: as for :class:`SAM`.

    It takes passes on the batch and on the memory at w, which do not depend on each other, and the same at w + e. ::

        for p in optimizer.each_pass():
            if p.data == "train":
                loss_fn(model(x), y).backward()
            elif len(memory) > 0:
                memory_loss(model, memory_batch).backward()

    GradScaler is refused: it would look for infinities in the gradients of the last pass alone.
    """

    yields_passes_together = True
    takes_scaled_gradients = False
    is_capturable = True
    perturbs_micro_batches = True
    _scaling_obstacle = "it would look for infinities in the gradients of the last pass alone"

    mu = Number(at_least=0, per_group=True)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        mu: float = 1.0,
        *,
        adaptive: Adaptive = False,
        eta: float | None = None,
        perturb_eps: float = NORM_EPSILON,
        closure_runs: ClosureRuns = "every_pass",
        backend: str | None = None,
        master_weights: bool = False,
        process_group: Any = None,
        counts_in_norm: Callable[[Tensor], bool] | None = None,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(**handed_on(locals()))

    def passes(self) -> Passes:
        g_task, g_memory = yield [Pass(kept=True), Pass(MEMORY, kept=True, may_be_empty=True)]
        rule = NormalizedSum(epsilon=self._rule.epsilon)
        self.ascend(g_task, g_memory, rule=rule, scale=[[rho, rho] for [rho] in self.radii()])
        g_task_plus, g_memory_plus = yield [
            Pass(perturbed=True, kept=True),
            Pass(MEMORY, perturbed=True, kept=True, may_be_empty=True, last=True),
        ]
        weights = [[1.0, 1.0, mu] for [mu] in self.per_group("mu")]
        yield Update(g_task_plus, g_memory_plus, g_memory, scale=weights)
