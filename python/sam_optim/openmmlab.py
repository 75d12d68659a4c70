"""Where OpenMMLab's configurations find it: ``custom_imports = dict(imports="sam_optim.openmmlab")``."""

from .trainers.openmmlab import SharpnessAwareHook, sharpness_aware_from_config

__all__ = ["SharpnessAwareHook", "sharpness_aware_from_config"]
