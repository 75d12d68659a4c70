"""Sharpness-aware optimizers for PyTorch on fused multi-tensor kernels."""

from .agnostic import AgnosticSAM
from .batch_norm import (
    disable_running_stats,
    enable_running_stats,
    freeze_in_perturbed_passes,
    frozen_batch_norm,
    running_statistics,
)
from .errors import InvalidSettingError, StepOrderError
from .moves import StepReport
from .optimizer import SharpnessAwareOptimizer
from .passes import Pass, Passes
from .randomness import RandomState
from .sam import ASAM, SAM
from .sampa import SAMPa
from .schedules import LambdaRho, RhoFollowsLR
from .train_step import TrainStep, split_batch
from .variants import GSAM, WSAM, FriendlySAM, LookSAM, StableSAM

__all__ = [
    "ASAM",
    "GSAM",
    "SAM",
    "WSAM",
    "AgnosticSAM",
    "FriendlySAM",
    "InvalidSettingError",
    "LambdaRho",
    "LookSAM",
    "Pass",
    "Passes",
    "RandomState",
    "RhoFollowsLR",
    "SAMPa",
    "SharpnessAwareOptimizer",
    "StableSAM",
    "StepOrderError",
    "StepReport",
    "TrainStep",
    "disable_running_stats",
    "enable_running_stats",
    "freeze_in_perturbed_passes",
    "frozen_batch_norm",
    "running_statistics",
    "split_batch",
]
