"""Uniform attention."""

import torch
from torch import Tensor

from visionattn.attention.linear import PositiveAttention


class UniformAttention(PositiveAttention):
    """The mean of the values: ``k(q, k) = 1``, one feature, O(N). The control for all others.

    What a mechanism gains over this one is what its queries and keys are worth, which this one has but does not read.
    """

    def log_features(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[..., :1])

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.zeros_like(q[..., :1]) @ torch.zeros_like(k[..., :1]).transpose(-2, -1)
