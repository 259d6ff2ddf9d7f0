"""InLine attention."""

from torch import Tensor

from visionattn.attention.base import allowed
from visionattn.attention.linear import SignedAttention
from visionattn.ops import inline
from visionattn.ops.scan import Family


class InlineAttention(SignedAttention):
    """Weights ``1/N + q.(k_j - mean k) / (N sqrt(D))`` (InLine, arXiv 2412.06590, section 4); O(N), no denominator.

    Exact. Weights sum to one but may be negative, and outputs grow with the length of queries and keys: keep it in
    check by ``qk_norm``. As in softmax attention, what all keys share does not matter. The source's residual, a 3 x 3
    convolution with weights predicted for each image, is left out. There is no fused kernel for it.
    """

    def queries(self, q: Tensor) -> Tensor:
        return inline.query_features(q)

    def keys(self, k: Tensor) -> Tensor:
        return k

    def family(self) -> Family:
        return inline

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        return inline.linear(q, k, v, keep)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return inline.weights(q, k, allowed(q @ k.transpose(-2, -1), attn_mask, is_causal)) @ v
