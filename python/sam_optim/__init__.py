"""Sharpness-aware optimizers for PyTorch on fused multi-tensor kernels."""

from .analysis.stability import Stability, StabilityMonitor, edge_of_stability
from .continual.replay import ReservoirMemory, dark_experience_loss
from .core.errors import InvalidSettingError, StepOrderError
from .core.optimizer import SharpnessAwareOptimizer
from .core.passes import Pass, Passes, Update
from .core.randomness import RandomState
from .core.report import StepReport
from .methods.ae_sam import AESAM
from .methods.agnostic_sam import AgnosticSAM
from .methods.align_sam import AlignSAM
from .methods.asam import ASAM
from .methods.cr_sam import CRSAM
from .methods.friendly_sam import FriendlySAM
from .methods.gnp import GNP
from .methods.gsam import GSAM
from .methods.interval_sam import IntervalSAM
from .methods.look_sam import LookSAM
from .methods.mgser_sam import MGSERSAM
from .methods.momentum_sam import MomentumSAM
from .methods.randomized_sam import RandomizedSAM
from .methods.sam import SAM
from .methods.sam_on import perturb_normalization_only, sam_on
from .methods.sampa import SAMPa
from .methods.stable_sam import StableSAM
from .methods.unified_sam import UnifiedSAM
from .methods.usam import USAM
from .methods.vasso import VaSSO
from .methods.wsam import WSAM
from .trainers.hugging_face import SharpnessAwareTrainerMixin
from .training.batches import split_batch
from .training.m_sam import m_sam
from .training.schedules import LambdaRho, RhoFollowsLR
from .training.statistics import (
    disable_running_stats,
    enable_running_stats,
    freeze_in_perturbed_passes,
    frozen_batch_norm,
    running_statistics,
)
from .training.train_step import TrainStep

__all__ = [
    "AESAM",
    "ASAM",
    "CRSAM",
    "GNP",
    "GSAM",
    "MGSERSAM",
    "SAM",
    "USAM",
    "WSAM",
    "AgnosticSAM",
    "AlignSAM",
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
    "m_sam",
    "perturb_normalization_only",
    "running_statistics",
    "sam_on",
    "split_batch",
]
