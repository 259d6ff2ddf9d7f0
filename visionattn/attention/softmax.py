"""Softmax attention."""

from torch import Tensor

from visionattn.attention.base import Attention
from visionattn.ops import softmax


class SoftmaxAttention(Attention):
    """``exp(q.k / sqrt(D))``, normalised; O(N^2), by PyTorch's fused kernels. The control for every linear kernel."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        return softmax.fused(q, k, v, attn_mask=attn_mask, is_causal=is_causal, dropout=dropout)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax.reference(q, k, v)
