"""ELA's Hadamard exponential kernel."""

from torch import Tensor

from visionattn.attention.linear import PositiveAttention
from visionattn.ops import ela_hadamard
from visionattn.ops.fused import FeatureMap
from visionattn.ops.precision import widen


class ElaHadamardAttention(PositiveAttention):
    """``sum_d exp(q_d + k_d)`` (arXiv 2605.18848, section 3), normalised: co-activation of features; D features, O(N).

    Exact for its own kernel, which is not softmax attention's ``exp(q.k)``: as a matrix over tokens its rank is at most
    D. Queries and keys are not scaled: the kernel is separable, so the projections carry the scale.
    """

    def log_features(self, x: Tensor) -> Tensor:
        return widen(x)

    def fused_map(self) -> FeatureMap:
        return FeatureMap("exp")

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return ela_hadamard.log_kernel(q, k)
