"""Attention by kernels of Triton for GPUs, with the feature map computed on chip.

Nothing here is imported until a kernel is needed: Triton is not on every machine.
"""

from visionattn.ops.fused.dispatch import attend_causally, attend_positive, attend_with_moments, reaches, refuse
from visionattn.ops.fused.maps import FeatureMap, softmax_features, yat_features

__all__ = [
    "FeatureMap",
    "attend_causally",
    "attend_positive",
    "attend_with_moments",
    "reaches",
    "refuse",
    "softmax_features",
    "yat_features",
]
