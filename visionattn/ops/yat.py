"""The Yat kernel, ``k(q, k) = (q.k)^2 / (|q - k|^2 + epsilon)``, normalised; exact and quadratic.

Source: SLAY (arXiv 2602.04915), section 3. On unit vectors it is the spherical Yat kernel ``x^2 / (2 + epsilon - 2 x)``
of the cosine x, the one that SLAY's features approximate.

The distance is ``|q|^2 + |k|^2 - 2 q.k`` in float32, so its error is about 1e-7 (|q|^2 + |k|^2): on vectors far longer
than their distance, pairs closer than that are not told apart.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from visionattn.ops.precision import widen

BLOCK = 512
"""Queries of a block; memory is that of BLOCK x N numbers a head."""

FLOOR = 1e-20
"""Added to the kernel: a query orthogonal to all keys gets the mean value."""


def unit(x: Tensor) -> Tensor:
    """Return ``x / sqrt(|x|^2 + 1e-6)``, in float32 at least: of unit length, with a bounded gradient at zero."""
    x = widen(x)
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def kernel(q: Tensor, k: Tensor, epsilon: float, floor: float = FLOOR) -> Tensor:
    """The kernel of all pairs, (B, H, N, N)."""
    product = q @ k.transpose(-2, -1)
    square = q.square().sum(-1, keepdim=True) + k.square().sum(-1).unsqueeze(-2) - 2 * product
    return product.square() / (square.clamp(min=0) + epsilon) + floor


def log_kernel(q: Tensor, k: Tensor, epsilon: float, floor: float = FLOOR) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N), from the differences themselves; O(N^2 D) memory."""
    square = (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)
    return ((q @ k.transpose(-2, -1)).square() / (square + epsilon) + floor).log()


def attend(
    q: Tensor, k: Tensor, v: Tensor, epsilon: float, keep: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Attend in O(N^2 D) time and, a block of queries at a time, O(N) memory, also in training.

    Args:
        q: queries, (B, H, N, D).
        k: keys, (B, H, N, D).
        v: values, (B, H, N, E).
        epsilon: of the kernel.
        keep: key mask.
        is_causal: token i attends to tokens 0..i.
    """
    q, k, wide = widen(q), widen(k), widen(v)
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _block(q, k, wide, epsilon, keep, is_causal, 0).to(v.dtype)
    return _blocks(q, k, wide, epsilon, keep, is_causal).to(v.dtype)


@torch.jit.unused
def _blocks(q: Tensor, k: Tensor, v: Tensor, epsilon: float, keep: Tensor | None, is_causal: bool) -> Tensor:
    # A graph of any size cannot hold a number of blocks that depends on the size.
    if torch.compiler.is_compiling() or q.shape[-2] <= BLOCK:
        return _block(q, k, v, epsilon, keep, is_causal, 0)
    saves = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    blocks = []
    for start in range(0, q.shape[-2], BLOCK):
        inputs = (q[..., start : start + BLOCK, :], k, v, epsilon, keep, is_causal, start)
        blocks.append(checkpoint(_block, *inputs, use_reentrant=False) if saves else _block(*inputs))
    return torch.cat(blocks, -2)


def _block(q: Tensor, k: Tensor, v: Tensor, epsilon: float, keep: Tensor | None, is_causal: bool, start: int) -> Tensor:
    weights = kernel(q, k, epsilon)
    if is_causal:
        rows = torch.arange(start, start + q.shape[-2], device=q.device).unsqueeze(-1)
        weights = weights.masked_fill(torch.arange(k.shape[-2], device=q.device) > rows, 0.0)
    if keep is not None:
        weights = weights.masked_fill(~keep.transpose(-2, -1), 0.0)
        v = v.masked_fill(~keep, 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ v
