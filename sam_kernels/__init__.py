"""Multi-tensor kernels for Sharpness-Aware Minimization, behind one functional API.

``reference`` is the definition in plain PyTorch; the other backends agree with it and are fast.
"""

from .bases import SGD, Adam, AdamSettings, SGDSettings
from .errors import BackendUnavailableError, UnsupportedTensorError
from .ops import ascent_, combine_, descent_, gram, look_ahead_, perturb_, restore_
from .plan import Plan
from .registry import BackendStatus, backends
from .report import LaunchReport
from .rules import Deflected, Fixed, Normalized, NormalizedSum, NormMatched, Rule
from .sharding import Peers
from .snapshot import Snapshot

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamSettings",
    "BackendStatus",
    "BackendUnavailableError",
    "Deflected",
    "Fixed",
    "LaunchReport",
    "NormMatched",
    "Normalized",
    "NormalizedSum",
    "Peers",
    "Plan",
    "Rule",
    "SGDSettings",
    "Snapshot",
    "UnsupportedTensorError",
    "ascent_",
    "backends",
    "combine_",
    "descent_",
    "gram",
    "look_ahead_",
    "perturb_",
    "restore_",
]
