"""ReLU linear attention."""

from torch import Tensor

from visionattn.attention.linear import PositiveAttention
from visionattn.ops import relu
from visionattn.ops.fused import FeatureMap


class ReluAttention(PositiveAttention):
    """``phi(q).phi(k)`` with ``phi(x) = relu(x) + 1e-6`` (EfficientViT, arXiv 2205.14756, section 3.1); O(N).

    D features; exact for its own kernel. The small constant belongs to the kernel, where the source has one in the
    denominator.
    """

    def log_features(self, x: Tensor) -> Tensor:
        return relu.log_features(x)

    def fused_map(self) -> FeatureMap:
        return FeatureMap("relu")

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return relu.log_kernel(q, k)
