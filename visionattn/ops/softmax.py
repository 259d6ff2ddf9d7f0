"""Softmax attention, ``k(q, k) = exp(q.k / sqrt(D))``: the quadratic control for every linear kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Softmax attention through its explicit N x N matrix.

    Args:
        q: queries, (B, H, N, D).
        k: keys, (B, H, N, D).
        v: values, (B, H, N, E).
        attn_mask: boolean (True: attend) or additive, broadcastable to (B, H, N, N).
        is_causal: token i sees tokens 0..i only.
    """
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1) @ v


def fused(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """The same by PyTorch's fused kernels; ``dropout`` is the probability of dropping an attention weight."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
