"""Memory for what kernels write."""

import torch
from torch import Tensor

from visionattn.ops.packing import packed_like


def output_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory for an output, (B, N, H, D), for x (B, H, N, D).

    It is not transposed here: an operator that returns a view forbids its users to change it in place.
    """
    B, H, N, D = x.shape
    return x.new_empty(B, N, H, D, dtype=dtype)


def gradient_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory for a gradient, (B, H, N, D), that lies as (B, N, H, D)."""
    return output_like(x, dtype).transpose(1, 2)


def gradients_like(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the gradients of queries, keys and values: in one packed projection, if they are alike.

    Args:
        q: (B, H, N, D).
        k: (B, H, N, D).
        v: (B, H, N, E).
        dtype: of the gradients of queries and keys, if not theirs.
    """
    if dtype is None and q.shape == v.shape and q.dtype == k.dtype == v.dtype:
        return packed_like(q)
    return gradient_like(q, dtype), gradient_like(k, dtype), gradient_like(v)
