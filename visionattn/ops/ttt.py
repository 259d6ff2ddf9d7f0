"""Test-time training: a small network is fitted to an image's keys and values by one step, and then read by queries.

The network is ``f(x) = (x W1) * silu(x W2)``; its loss, ``-(s/N) sum_j v_j.f(k_j)`` with s = 1/3, has the gradient

    G1 = -(s/N) K^T (V * silu(K W2)),   G2 = -(s/N) K^T (V * (K W1) * silu'(K W2)).

Each column g of a gradient is shortened to ``g / (1 + |g|)`` and taken off the weights, which every image thus has of
its own; the output is f of the queries. There is no kernel of pairs, and weights of tokens do not sum to one.

Source: ViT^3 (arXiv 2512.01643), section 4, and its code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops.precision import outcast, widen


def attend(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor, keep: Tensor | None = None) -> Tensor:
    """Fit the network and read it, in O(N D^2) time, in float32 at least; tokens that all are padding get zeros.

    Args:
        q: (B, H, N, D).
        k: (B, H, N, D).
        v: (B, H, N, D).
        first: W1 of each head, (H, D, D).
        second: W2, likewise.
        keep: key mask.
    """
    queries, keys, values = widen(q), outcast(widen(k), keep), outcast(widen(v), keep)
    first, second = widen(first), widen(second)
    count = kept(values, keep)
    values = values / (3.0 * count.clamp(min=1.0))
    product, gate = keys @ first, keys @ second
    sigmoid = gate.sigmoid()
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    first = first + shortened(keys.transpose(-2, -1) @ (values * gate * sigmoid))
    second = second + shortened(keys.transpose(-2, -1) @ (values * product * slope))
    return ((queries @ first) * F.silu(queries @ second) * (count > 0)).to(v.dtype)


def kept(values: Tensor, keep: Tensor | None) -> Tensor:
    """Return how many tokens a mask keeps, broadcastable to (B, H, 1, 1)."""
    if keep is None:
        return torch.full_like(values[..., :1, :1], values.shape[-2])
    return keep.sum(-2, keepdim=True).to(values.dtype)


def shortened(step: Tensor) -> Tensor:
    """Return a matrix whose columns are shorter than one."""
    return step / (1.0 + torch.linalg.vector_norm(step, dim=-2, keepdim=True))


def by_autograd(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return what :func:`attend` does, with the gradient of the loss as it is taken by PyTorch."""
    allowed = torch.ones_like(v[..., :1], dtype=torch.bool) if keep is None else keep.expand_as(v[..., :1])
    count = allowed.sum(-2, keepdim=True)
    with torch.enable_grad():
        weights = [w.expand(len(q), *w.shape) for w in (first, second)]
        fitted = (k @ weights[0]) * F.silu(k @ weights[1])
        loss = -((v * fitted).sum(-1, keepdim=True) * allowed / count.clamp(min=1)).sum() / 3
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
    first, second = (w - g / (1 + g.norm(dim=-2, keepdim=True)) for w, g in zip(weights, gradients, strict=True))
    return (q @ first) * F.silu(q @ second) * (count > 0)
