"""Softmax attention."""

import torch
from torch import Tensor

from visionattn.attention.base import Attention, key_mask, mean_of
from visionattn.ops import softmax
from visionattn.ops.cache import Cache, extended


class SoftmaxAttention(Attention):
    """``exp(q.k / sqrt(D))``, normalised; the control for every linear kernel.

    O(N^2 D) time on PyTorch's fused kernels, which need no N x N memory; the state of :meth:`step` is all keys and
    values.
    """

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        return softmax.fused(q, k, v, attn_mask, is_causal, dropout)

    def center(self, q: Tensor, k: Tensor, attn_mask: Tensor | None) -> Tensor:
        keys_alone = attn_mask is not None and attn_mask.dtype == torch.bool and attn_mask.shape[-2] == 1
        return mean_of(k, key_mask(attn_mask) if keys_alone else None)  # any vector will do: it cancels

    def advance(self, q: Tensor, k: Tensor, v: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        state = extended(state, k, v)
        return softmax.fused(q, state.k, state.v), state

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return softmax.log_kernel(q, k)
