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


class Deviation(NamedTuple):
    """What queries get of the tokens: ``mean`` (B, H, 1 or N, E) of the values, and what the kernel does about it.

    ``correction`` (B, H, N, E): mean over the keys of the kernel times the value less that mean; ``mass`` (B, H, N, 1):
    mean of the kernel; ``size`` (B, H, N, 1): mean of the absolute values of its terms.
    """

    mean: Tensor
    correction: Tensor
    mass: Tensor
    size: Tensor


def linear(phi: Tensor, psi: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attend over all tokens in O(N F E) time."""
    found = deviation(phi, psi, v, keep)
    return (found.mean + found.correction / guard(found.mass, found.size)).to(v.dtype)


def deviation(phi: Tensor, psi: Tensor, v: Tensor, keep: Tensor | None) -> Deviation:
    """Return what queries get of all tokens."""
    phi, psi, wide = widen(phi), outcast(widen(psi), keep), outcast(widen(v), keep)
    count = torch.full_like(wide[..., :1, :1], v.shape[-2]) if keep is None else keep.sum(-2, keepdim=True)
    count = count.clamp(min=1).to(wide.dtype)
    mean = wide.sum(-2, keepdim=True) / count
    share = psi / count
    return Deviation(
        mean,
        phi @ (share.transpose(-2, -1) @ (wide - mean)),
        phi @ share.sum(-2).unsqueeze(-1),
        phi.abs() @ share.abs().sum(-2).unsqueeze(-1),
    )


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
    found = deviation_of(partial)
    return (found.mean + found.correction / guard(found.mass, found.size)) * (partial.tokens > 0)


def deviation_of(partial: Partial) -> Deviation:
    """Return what queries got of the tokens."""
    tokens = partial.tokens.clamp(min=1.0)
    offset = partial.offset / tokens
    correction = (partial.values - partial.mass * offset) / tokens
    return Deviation(partial.origin + offset, correction, partial.mass / tokens, partial.size / tokens)


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
