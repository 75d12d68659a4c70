"""Sharpness-aware optimizers for PyTorch on fused multi-tensor kernels."""

from .agnostic import AgnosticSAM
from .batch_norm import (
    disable_running_stats,
    enable_running_stats,
    freeze_in_perturbed_passes,
    frozen_batch_norm,
    running_statistics,
)
from .batches import split_batch
from .continual import ReservoirMemory, dark_experience_loss
from .directions import MomentumSAM, UnifiedSAM, VaSSO
from .errors import InvalidSettingError, StepOrderError
from .groups import perturb_normalization_only
from .hugging_face import SharpnessAwareTrainerMixin
from .mgser import MGSERSAM
from .moves import StepReport
from .occasional import AESAM, IntervalSAM, RandomizedSAM
from .optimizer import SharpnessAwareOptimizer
from .passes import Pass, Passes, Update
from .randomness import RandomState
from .sam import ASAM, SAM
from .sampa import SAMPa
from .schedules import LambdaRho, RhoFollowsLR
from .stability import Stability, StabilityMonitor, edge_of_stability
from .train_step import TrainStep
from .variants import CRSAM, GSAM, WSAM, FriendlySAM, LookSAM, StableSAM

__all__ = [
    "AESAM",
    "ASAM",
    "CRSAM",
    "GSAM",
    "MGSERSAM",
    "SAM",
    "WSAM",
    "AgnosticSAM",
    "FriendlySAM",
    "IntervalSAM",
    "InvalidSettingError",
    "LambdaRho",
    "LookSAM",
    "MomentumSAM",
    "Pass",
    "Passes",
    "RandomState",
    "RandomizedSAM",
    "ReservoirMemory",
    "RhoFollowsLR",
    "SAMPa",
    "SharpnessAwareOptimizer",
    "SharpnessAwareTrainerMixin",
    "Stability",
    "StabilityMonitor",
    "StableSAM",
    "StepOrderError",
    "StepReport",
    "TrainStep",
    "UnifiedSAM",
    "Update",
    "VaSSO",
    "dark_experience_loss",
    "disable_running_stats",
    "edge_of_stability",
    "enable_running_stats",
    "freeze_in_perturbed_passes",
    "frozen_batch_norm",
    "perturb_normalization_only",
    "running_statistics",
    "split_batch",
]
