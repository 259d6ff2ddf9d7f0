"""Rank-augmented linear attention."""

from torch import Tensor

from visionattn.attention.base import key_mask, refuse_order, softmax_over
from visionattn.attention.linear import WholeAttention
from visionattn.ops import rala


class RalaAttention(WholeAttention):
    """ELU+1 attention over keys that the mean query weighs (RALA, arXiv 2411.07635, section 3); O(N).

    D features; exact for its own kernel. All tokens of an image, prefix tokens too, make the mean query: there is no
    causal form. The source turns queries and keys by rotary positions in the products alone, with weights that no
    longer sum to one, and gates the output; both are left out. There is no fused kernel for it.
    """

    def features(
        self, q: Tensor, k: Tensor, keep: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        return rala.log_features(q, k, keep)

    def feature_size(self) -> int:
        return self.head_dim

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return rala.log_kernel(q, k)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if is_causal:
            refuse_order()
        return softmax_over(rala.log_kernel(q, k, key_mask(attn_mask)), attn_mask) @ v
