"""Magnitude-aware linear attention."""

from torch import Tensor

from visionattn.attention.base import allowed
from visionattn.attention.linear import SignedAttention
from visionattn.ops import mala
from visionattn.ops.scan import Family


class MalaAttention(SignedAttention):
    """ELU+1 attention whose deviation from the mean grows with the query (MALA, arXiv 2507.00698, section 3); O(N).

    D features; exact. Weights sum to one but may be negative. The source turns queries and keys by rotary positions in
    the products alone, with weights that no longer sum to one, and gates the output; both are left out. There is no
    fused kernel for it.
    """

    def queries(self, q: Tensor) -> Tensor:
        return mala.features(q)

    def keys(self, k: Tensor) -> Tensor:
        return mala.features(k)

    def family(self) -> Family:
        return mala

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        return mala.linear(q, k, v, keep)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return mala.weights(q, k, allowed(q @ k.transpose(-2, -1), attn_mask, is_causal)) @ v
