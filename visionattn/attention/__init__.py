"""Attention mechanisms by name. A new one is a file here and a line in :data:`ATTENTION`."""

from visionattn.attention.base import Attention
from visionattn.attention.dark import whiten
from visionattn.attention.exact import exact_kernel
from visionattn.attention.explanation import Explanation, explain
from visionattn.attention.layer import attention_layer
from visionattn.attention.linear import DistanceAttention, LinearAttention, PositiveAttention, SignedAttention
from visionattn.attention.registry import ATTENTION
from visionattn.ops.criteria import check_kernel

__all__ = [
    "ATTENTION",
    "Attention",
    "DistanceAttention",
    "Explanation",
    "LinearAttention",
    "PositiveAttention",
    "SignedAttention",
    "attention_layer",
    "check_kernel",
    "exact_kernel",
    "explain",
    "whiten",
]
