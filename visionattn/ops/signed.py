"""Kernels with features of any sign, ``k(q, k) = phi(q).psi(k)``, given by their values.

The kernel should be non-negative, though its features need not be. Everything is summed in float32, and a denominator
below the rounding error of its own sum is replaced by that bound. The output is computed as a correction of the mean
value, so a query that no key answers gets the mean and constant values come back exactly.

Here ``phi`` is (B, H, N, F) for the queries and ``psi`` is (B, H, N, F) for the keys.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn.ops.precision import outcast, rounding, tiny, widen


class State(NamedTuple):
    """Sums over the tokens so far, of values v less an origin, which is the first of them.

    ``values`` (B, H, F, E): psi times v; ``mass`` (B, H, F, 1): psi; ``size`` (B, H, F, 1): its absolute value;
    ``offset`` (B, H, 1, E): v; ``tokens`` (B, H, 1, 1): how many; ``origin`` (B, H, 1, E).
    """

    values: Tensor
    mass: Tensor
    size: Tensor
    offset: Tensor
    tokens: Tensor
    origin: Tensor


class Partial(NamedTuple):
    """Attention to some of the tokens, not normalised: what the state holds, of the kernel in place of psi, a query."""

    values: Tensor
    mass: Tensor
    size: Tensor
    offset: Tensor
    tokens: Tensor
    origin: Tensor


def linear(phi: Tensor, psi: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attend over all tokens in O(N F E) time."""
    phi, psi, wide = widen(phi), outcast(widen(psi), keep), outcast(widen(v), keep)
    tokens = v.shape[-2]
    count = torch.full_like(wide[..., :1, :1], tokens) if keep is None else keep.sum(-2, keepdim=True).to(wide.dtype)
    mean = wide.sum(-2, keepdim=True) / count.clamp(min=1.0)
    values = (psi / tokens).transpose(-2, -1) @ (wide - mean)
    mass = phi @ psi.mean(-2).unsqueeze(-1)
    size = phi.abs() @ psi.abs().mean(-2).unsqueeze(-1)
    return (mean + phi @ values / guard(mass, size)).to(v.dtype)


def guard(mass: Tensor, size: Tensor) -> Tensor:
    """Keep a denominator away from zero: at least the rounding error of a sum whose terms have ``size`` in all.

    It is 1 for a sum of nothing, whose numerator is 0.
    """
    floor = (rounding(mass) * size).clamp(min=tiny())
    guarded = torch.where(mass.abs() < floor, torch.where(mass < 0, -floor, floor), mass)
    return torch.where(size > 0, guarded, 1.0)


def summarize(psi: Tensor, v: Tensor, keep: Tensor | None) -> State:
    """Sum over some tokens."""
    psi, v = outcast(widen(psi), keep), outcast(widen(v), keep)
    share = torch.ones_like(v[..., :1]) if keep is None else keep.to(v.dtype).expand_as(v[..., :1])
    origin = v[..., :1, :]
    apart = (v - origin) * share
    return State(
        psi.transpose(-2, -1) @ apart,
        psi.sum(-2).unsqueeze(-1),
        psi.abs().sum(-2).unsqueeze(-1),
        apart.sum(-2, keepdim=True),
        share.sum(-2, keepdim=True),
        origin,
    )


def merge(first: State, second: State) -> State:
    """Join the states of two sets of tokens."""
    return State(*_joined(first, second))


def read(phi: Tensor, state: State) -> Partial:
    """Attend from queries to the tokens of a state."""
    phi = widen(phi)
    return Partial(phi @ state.values, phi @ state.mass, phi.abs() @ state.size, *state[3:])


def within(phi: Tensor, psi: Tensor, v: Tensor, allowed: Tensor) -> Partial:
    """Attend from n queries to n keys where ``allowed`` (B, H, n, n)."""
    phi, psi, v = widen(phi), widen(psi), widen(v)
    kernel = (phi @ psi.transpose(-2, -1)).masked_fill(~allowed, 0.0)
    size = (phi.abs() @ psi.abs().transpose(-2, -1)).masked_fill(~allowed, 0.0)
    origin = v[..., :1, :]
    counts = allowed.to(v.dtype)
    return Partial(
        kernel @ (v - origin),
        kernel.sum(-1, keepdim=True),
        size.sum(-1, keepdim=True),
        counts @ (v - origin),
        counts.sum(-1, keepdim=True),
        origin,
    )


def combine(first: Partial, second: Partial) -> Partial:
    """Join what one query got from two sets of tokens."""
    return Partial(*_joined(first, second))


def finish(partial: Partial) -> Tensor:
    """Normalise, as a correction of the mean value; nothing attended to gives zeros."""
    offset = partial.offset / partial.tokens.clamp(min=1.0)
    correction = (partial.values - partial.mass * offset) / guard(partial.mass, partial.size)
    return (partial.origin + offset + correction) * (partial.tokens > 0)


def _joined(first: Any, second: Any) -> Iterator[Tensor]:
    """Add two sets of sums, about the origin of the first, or of the second if the first is empty."""
    origin = torch.where(first.tokens > 0, first.origin, second.origin)
    shifted = []
    for part in (first, second):
        shift = part.origin - origin
        values, offset = part.values + part.mass * shift, part.offset + part.tokens * shift
        shifted.append((values, part.mass, part.size, offset, part.tokens))
    yield from (x + y for x, y in zip(*shifted, strict=True))
    yield origin
