"""InLine's weights, ``1/N + s q.(k_j - k') / N`` with the mean key k' and ``s = D^(-1/2)``: they sum to one undivided.

In the terms of :mod:`visionattn.ops.signed`, the mean value plus the correction itself; MALA
(:mod:`visionattn.ops.mala`) has another gain on the correction. Moving all keys by one vector changes nothing. Weights
may be negative, and grow with the length of queries and keys.

Source: InLine attention (arXiv 2412.06590), section 4, and its code, whose products are means over the keys.
"""

import torch
from torch import Tensor

from visionattn.ops import signed
from visionattn.ops.precision import widen
from visionattn.ops.signed import Partial, combine, merge, read, summarize, within

__all__ = ["combine", "finish", "linear", "merge", "query_features", "read", "summarize", "weights", "within"]


def query_features(q: Tensor) -> Tensor:
    """Return ``s q``."""
    return widen(q) * q.shape[-1] ** -0.5


def linear(phi: Tensor, psi: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attend over all tokens in O(N D E) time, in float32 whatever the type of the values."""
    found = signed.deviation(phi, psi, v, keep)
    return (found.mean + found.correction).to(v.dtype)


def finish(partial: Partial) -> Tensor:
    """Add the correction to the mean value; nothing attended to gives zeros."""
    found = signed.deviation_of(partial)
    return (found.mean + found.correction) * (partial.tokens > 0)


def weights(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """Return the weights of all pairs, (B, H, N, N), where ``allowed`` (B, H, N, N)."""
    count = allowed.sum(-1, keepdim=True).clamp(min=1)
    logits = torch.where(allowed, q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, 0.0)
    return torch.where(allowed, (1 + logits - logits.sum(-1, keepdim=True) / count) / count, 0.0)
