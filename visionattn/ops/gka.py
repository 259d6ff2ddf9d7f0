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
    if window:
        mixed = _windowed(queries, keys, bias, wide, window, is_causal, dropout)
    else:
        queries, keys = _beside(torch.ones_like(queries[..., :1]), queries), _beside(bias, keys)
        values = F.pad(wide, [8, 0])
        mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=is_causal, scale=1.0)
    return mixed[..., 8:].to(x.dtype)


def _beside(channel: Tensor, x: Tensor) -> Tensor:
    """Put one more channel before those of x; fused kernels want one width for all, divisible by 8."""
    return torch.cat((F.pad(channel, [7, 0]), x), -1)


def _windowed(q: Tensor, k: Tensor, bias: Tensor, v: Tensor, window: int, is_causal: bool, dropout: float) -> Tensor:
    """Blocks of ``window`` tokens attend to the block before them, to their own and, if not causal, to the next.

    The keys of a block are a view of the whole sequence, not a copy. A mask within a block keeps the window: of
    the pairs computed two thirds count, or half if causal. PyTorch has no kernel for bands that runs on all devices and
    in exported graphs, so masked softmax attention over blocks is the best there is.
    """
    tokens = q.shape[-2]
    blocks = (tokens - 1) // window + 1
    end = blocks * window - tokens
    reach, after = (2 * window, end) if is_causal else (3 * window, end + window)
    queries = _beside(F.pad(torch.ones_like(bias), [0, 0, 0, end]), F.pad(q, [0, 0, 0, end]))
    keys = _beside(F.pad(bias, [0, 0, window, after], value=never()), F.pad(k, [0, 0, window, after]))
    values = F.pad(v, [8, 0, window, after])
    queries = queries.unfold(-2, window, window).transpose(-2, -1)
    keys, values = (y.unfold(-2, reach, window).transpose(-2, -1) for y in (keys, values))
    rows = torch.arange(window, 2 * window, device=q.device).unsqueeze(-1)
    columns = torch.arange(reach, device=q.device)
    allowed = (columns - rows).abs() <= window
    if is_causal:
        allowed = allowed & (columns <= rows)
    mixed = F.scaled_dot_product_attention(
        queries.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        attn_mask=allowed,
        dropout_p=dropout,
        scale=1.0,
    )
    places = torch.arange(tokens, device=q.device)  # a slice could not be exported for any number of tokens
    return mixed.flatten(1, 2).index_select(1, places).reshape(q.shape[:-1] + values.shape[-1:])
