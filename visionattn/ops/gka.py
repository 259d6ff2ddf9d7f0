"""Gaussian kernel attention, ``k(x_i, x_j) = exp(-|x_i - x_j|^2 / (2 s^2))`` with the features as values, normalised.

The row factor cancels, so it is softmax attention of x with itself under a key bias,
``softmax_j(x_i.x_j / s^2 - |x_j|^2 / (2 s^2))``, and runs on PyTorch's fused kernels with the bias as one more channel.
Distances do not change when all tokens move, so x is centred first, which keeps the difference of the two terms
accurate.

Source: Gaussian Kernel Attention (arXiv 2605.02144).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops.precision import never, outcast, widen


def log_kernel(q: Tensor, k: Tensor, bandwidth: Tensor) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N), from the differences themselves; bandwidth s is (H,)."""
    square = (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)
    return -square / (2 * bandwidth.square().view(-1, 1, 1))


def attend(
    q: Tensor,
    x: Tensor,
    bandwidth: Tensor,
    keep: Tensor | None = None,
    is_causal: bool = False,
    window: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from ``q`` to ``x`` in O(N^2 D) time and O(N D) memory; with a window of w, in O(N w D) time.

    Args:
        q: features of the tokens that attend, (B, H, n, D); all of ``x``, or any others without mask and window.
        x: features, keys and values at once, (B, H, N, D).
        bandwidth: s of each head, (H,).
        keep: key mask.
        is_causal: token i attends to tokens 0..i.
        window: attend to tokens at most so many places away; 0 for all.
        dropout: probability of dropping an attention weight.
    """
    wide, inverse = outcast(widen(x), keep), 1 / bandwidth.to(widen(x).dtype).view(-1, 1, 1)
    middle = wide.mean(-2, keepdim=True).detach()
    queries, keys = (widen(q) - middle) * inverse, (wide - middle) * inverse
    bias = outcast(-keys.square().sum(-1, keepdim=True) / 2, keep, never())
    # Fused kernels want one width for all, divisible by 8.
    queries = torch.cat((F.pad(torch.ones_like(queries[..., :1]), [7, 0]), queries), -1)
    keys = torch.cat((F.pad(bias, [7, 0]), keys), -1)
    values = F.pad(wide, [8, 0])
    if window:
        mixed = _windowed(queries, keys, values, window, is_causal, dropout)
    else:
        mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=is_causal, scale=1.0)
    return mixed[..., 8:].to(x.dtype)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, is_causal: bool, dropout: float) -> Tensor:
    """Blocks of ``window`` queries attend to their own block and to the ones before and after it."""
    bias = F.pad(k[..., 7:8], [0, 0, window, 2 * window], value=never())
    k, v = (F.pad(x, [0, 0, window, 2 * window]) for x in (k, v))
    k = torch.cat((k[..., :7], bias, k[..., 8:]), -1)
    k, v = (x.unfold(-2, 3 * window, window).transpose(-2, -1) for x in (k, v))
    blocks = F.pad(q, [0, 0, 0, window]).unfold(-2, window, window).transpose(-2, -1)
    rows = torch.arange(window, 2 * window, device=q.device).unsqueeze(-1)
    columns = torch.arange(3 * window, device=q.device)
    allowed = (columns - rows).abs() <= window
    if is_causal:
        allowed = allowed & (columns <= rows)
    mixed = F.scaled_dot_product_attention(
        blocks.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=allowed, dropout_p=dropout, scale=1.0
    )
    tokens = torch.arange(q.shape[-2], device=q.device)
    return mixed.flatten(1, 2).index_select(1, tokens).reshape(q.shape[:-1] + v.shape[-1:])
