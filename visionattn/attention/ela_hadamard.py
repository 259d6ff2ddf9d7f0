"""ELA's Hadamard exponential kernel."""

from torch import Tensor

from visionattn.attention.base import LinearAttention
from visionattn.ops import ela_hadamard


class ElaHadamardAttention(LinearAttention):
    """``sum_d exp(q_d + k_d)`` (arXiv 2605.18848, section 3), normalised; O(N), exact for its own kernel.

    Queries and keys are not scaled: the kernel is separable, so the projections carry the scale.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ela_hadamard.linear(q, k, v)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ela_hadamard.reference(q, k, v)
