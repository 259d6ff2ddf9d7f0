"""Softmax attention, ``k(q, k) = exp(q.k / sqrt(D))``: the quadratic control for every linear kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor


def log_kernel(q: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N)."""
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def fused(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Attend by PyTorch's fused kernels, in the type of the values.

    Args:
        q: queries, (B, H, N, D).
        k: keys, (B, H, N, D).
        v: values, (B, H, N, E).
        attn_mask: boolean (True: attend) or additive, broadcastable to (B, H, N, N). A query without any key gets
            zeros.
        is_causal: token i attends to tokens 0..i, within the mask.
        dropout: probability of dropping an attention weight.
    """
    if is_causal and attn_mask is not None:
        before = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        attn_mask = (
            (attn_mask & before) if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~before, float("-inf"))
        )
        is_causal = False
    return F.scaled_dot_product_attention(
        q.to(v.dtype), k.to(v.dtype), v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal
    )
