"""ELU+1 linear attention."""

from torch import Tensor

from visionattn.attention.linear import PositiveAttention
from visionattn.ops import elu
from visionattn.ops.fused import FeatureMap


class EluAttention(PositiveAttention):
    """``phi(q).phi(k)`` with ``phi(x) = elu(x) + 1`` (arXiv 2006.16236, equation 7); D features, O(N).

    Exact for its own kernel, which does not approximate softmax attention.
    """

    def log_features(self, x: Tensor) -> Tensor:
        return elu.log_features(x)

    def fused_map(self) -> FeatureMap:
        return FeatureMap("elu")

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return elu.log_kernel(q, k)
