"""ELA's kernel of direction and magnitude, ``k(q, k) = (a.b + 1)(|q|^2 + 1)(|k|^2 + 1)`` with unit vectors a, b.

Source: Exact Linear Attention (arXiv 2605.18848), section 3, the "softmax-like" example. That a and b are unit vectors
is our reading; without it the kernel could be negative. The factor ``|q|^2 + 1`` is the query's own and cancels.
"""

import torch
from torch import Tensor

from visionattn.ops.precision import widen
from visionattn.ops.yat import unit


def query_features(q: Tensor) -> Tensor:
    """Return ``[a; 1]``, (B, H, N, D + 1)."""
    a = unit(q)
    return torch.cat((a, torch.ones_like(a[..., :1])), -1)


def key_features(k: Tensor) -> Tensor:
    """Return ``(|k|^2 + 1)[b; 1]``, (B, H, N, D + 1)."""
    k = widen(k)
    return query_features(k) * (k.square().sum(-1, keepdim=True) + 1)


def log_kernel(q: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N)."""
    a, b = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    magnitude = (q.square().sum(-1) + 1).unsqueeze(-1) * (k.square().sum(-1) + 1).unsqueeze(-2)
    return ((a @ b.transpose(-2, -1) + 1) * magnitude).log()
