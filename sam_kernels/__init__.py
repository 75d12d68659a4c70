"""Multi-tensor kernels for Sharpness-Aware Minimization, behind one functional API.

``reference`` is the definition in plain PyTorch; the other backends agree with it and are fast.
"""

from .bases import SGD, Adam, AdamSettings, Lion, LionSettings, RMSprop, RMSpropSettings, SGDSettings
from .errors import BackendUnavailableError, UnsupportedTensorError, WeightsConvertedError
from .ops import apply_rule, ascent_, check_memory, combine_, descent_, gram, look_ahead_, perturb_, restore_
from .plan import Plan
from .registry import BackendStatus, backends
from .report import LaunchReport
from .rules import NORM_EPSILON, Deflected, Fixed, Normalized, NormalizedSum, NormMatched, Rule, RuleLike
from .scales import Scale
from .sharding import Peers
from .snapshot import Snapshot

__version__ = "0.1.0"

__all__ = [
    "NORM_EPSILON",
    "SGD",
    "Adam",
    "AdamSettings",
    "BackendStatus",
    "BackendUnavailableError",
    "Deflected",
    "Fixed",
    "LaunchReport",
    "Lion",
    "LionSettings",
    "NormMatched",
    "Normalized",
    "NormalizedSum",
    "Peers",
    "Plan",
    "RMSprop",
    "RMSpropSettings",
    "Rule",
    "RuleLike",
    "SGDSettings",
    "Scale",
    "Snapshot",
    "UnsupportedTensorError",
    "WeightsConvertedError",
    "apply_rule",
    "ascent_",
    "backends",
    "check_memory",
    "combine_",
    "descent_",
    "gram",
    "look_ahead_",
    "perturb_",
    "restore_",
]
