"""m-SAM: a step of SAM whose perturbation is one for each part of the batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.optimizer import SharpnessAwareOptimizer
from .train_step import LossFunction, TrainStep


def m_sam(
    model: nn.Module, optimizer: SharpnessAwareOptimizer, loss_fn: LossFunction, m: int, **options: Any
) -> TrainStep:
    """m-SAM (Foret et al. 2021, arXiv 2010.01412, section 4.1; Behdin et al. 2022, arXiv 2212.04343, as mSAM).

    ::

        for each of m parts of the batch:  e_j = rho g_j / |g_j|,  g+_j = gradient on part j at w + e_j
        w <- base_optimizer(w, mean of g+_j)

    It belongs to whoever has the batch, and is no optimizer: ``step = m_sam(model, optimizer, loss_fn, m=4)``, then
    ``step(batch)``. The same as ``TrainStep(model, optimizer, loss_fn, micro_batches=4, perturbation="micro_batch")``.
    A step takes as many gradients of samples as SAM's. BatchNorm sees each part by itself.

    Args:
        optimizer: :class:`SAM`, or another method that perturbs micro-batches.
        m: number of parts; with 1 it is the optimizer's own step. They are contiguous, and as equal as can be.
        **options: of :class:`TrainStep`.
    """
    return TrainStep(model, optimizer, loss_fn, micro_batches=m, perturbation="micro_batch", **options)
