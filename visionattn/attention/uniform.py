"""Uniform attention."""

from torch import Tensor

from visionattn.attention.linear import PositiveAttention


class UniformAttention(PositiveAttention):
    """The mean of the values: ``k(q, k) = 1``, one feature, O(N). The control for all others.

    What a mechanism gains over this one is what its queries and keys are worth, which this one has but does not read.
    """

    def log_features(self, x: Tensor) -> Tensor:
        return x[..., :1] * 0

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return (q[..., :1] * 0) @ (k[..., :1] * 0).transpose(-2, -1)
