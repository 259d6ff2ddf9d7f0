"""The squared-distance kernels of ELA: ``|q + k|^2`` and, with the keys negated, ``|q - k|^2``.

Source: Exact Linear Attention (arXiv 2605.18848), section 3. Expanded as ``|q|^2 + |k|^2 + 2 q.k`` the kernel cancels
in rounding and can turn negative. Centred at the mean key m, with a = q + m and c_j = k_j - m, its sum cannot:

    sum_j |q + k_j|^2 = N (|a|^2 + s),   s = mean_j |c_j|^2,

    y = v' + (2 a.C + u) / (|a|^2 + s + EPSILON),   C = mean_j c_j (v_j - v')^T,   u = mean_j |c_j|^2 (v_j - v'),

with v' the mean value. ``EPSILON`` belongs to the kernel, ``|q + k|^2 + EPSILON``: a query at no distance from any key
gets the mean value.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.ops import positive
from visionattn.ops.positive import Partial, combine, finish
from visionattn.ops.precision import outcast, tiny, widen

__all__ = ["EPSILON", "State", "combine", "finish", "linear", "log_kernel", "merge", "read", "summarize", "within"]

EPSILON = 1e-6


class State(NamedTuple):
    """Moments of the tokens so far, each a mean.

    ``tokens`` (B, H, 1, 1), how many; ``key`` m (B, H, 1, D); ``value`` v' (B, H, 1, E); ``cross`` C (B, H, D, E);
    ``spread`` s (B, H, 1, 1); ``pull`` u (B, H, 1, E).
    """

    tokens: Tensor
    key: Tensor
    value: Tensor
    cross: Tensor
    spread: Tensor
    pull: Tensor


def log_kernel(q: Tensor, k: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N), from the differences themselves; O(N^2 D) memory."""
    return ((q.unsqueeze(-2) + k.unsqueeze(-3)).square().sum(-1) + epsilon).log()


def linear(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attend over all tokens in O(N D E) time, in float32 whatever the input's type."""
    return read(q, summarize(k, v, keep)).mixed.to(v.dtype)


def summarize(k: Tensor, v: Tensor, keep: Tensor | None) -> State:
    """Take the moments of some tokens."""
    k, v = widen(k), widen(v)
    share = torch.ones_like(k[..., :1]) if keep is None else keep.to(k.dtype).expand_as(k[..., :1])
    count = share.sum(-2, keepdim=True)
    share = share / count.clamp(min=1.0)
    k, v = outcast(k, keep), outcast(v, keep)
    key, value = (share * k).sum(-2, keepdim=True), (share * v).sum(-2, keepdim=True)
    near, apart = k - key, v - value
    weighted = share * apart
    square = near.square().sum(-1, keepdim=True)
    return State(
        count,
        key,
        value,
        near.transpose(-2, -1) @ weighted,
        (share * square).sum(-2, keepdim=True),
        (square * weighted).sum(-2, keepdim=True),
    )


def merge(first: State, second: State) -> State:
    """Join the moments of two sets of tokens."""
    count = first.tokens + second.tokens
    share = second.tokens / count.clamp(min=1.0)
    key = first.key + share * (second.key - first.key)
    value = first.value + share * (second.value - first.value)
    cross, spread, pull = torch.zeros_like(first.cross), torch.zeros_like(first.spread), torch.zeros_like(first.pull)
    for state, part in ((first, 1 - share), (second, share)):
        shift, offset = state.key - key, state.value - value
        square = shift.square().sum(-1, keepdim=True)
        cross = cross + part * (state.cross + shift.transpose(-2, -1) @ offset)
        spread = spread + part * (state.spread + square)
        pull = pull + part * (state.pull + 2 * shift @ state.cross + (state.spread + square) * offset)
    return State(count, key, value, cross, spread, pull)


def read(q: Tensor, state: State, epsilon: float = EPSILON) -> Partial:
    """Attend from queries to the tokens of a state."""
    a = widen(q) + state.key
    mean_kernel = a.square().sum(-1, keepdim=True) + state.spread + epsilon
    mixed = state.value + (2 * a @ state.cross + state.pull) / mean_kernel
    mass = state.tokens * mean_kernel
    return Partial(mixed, mass.clamp(min=tiny()).log())


def within(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Partial:
    """Attend from n queries to n keys where ``allowed`` (B, H, n, n), in O(n^2 D) memory."""
    return positive.explicit(log_kernel(widen(q), widen(k)), v, allowed)
