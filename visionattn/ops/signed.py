"""Kernels with features of any sign, ``k(q, k) = phi(q).psi(k)``, given by their values.

The kernel should be non-negative, though its features need not be. Everything is summed in float32, and a denominator
below the rounding error of its own sum is replaced by that bound. The output is computed as a correction of the mean
value, so a query that no key answers gets the mean and constant values come back exactly.

Here ``phi`` is (B, H, N, F) for the queries and ``psi`` is (B, H, N, F) for the keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.ops.precision import outcast, rounding, tiny, widen


class State(NamedTuple):
    """Sums over the tokens so far: of psi times the values (B, H, F, E), of psi (B, H, F, 1) and of its size."""

    values: Tensor
    mass: Tensor
    size: Tensor


class Partial(NamedTuple):
    """Attention to some of the tokens, not normalised: (B, H, N, E), its mass (B, H, N, 1) and that mass's size."""

    values: Tensor
    mass: Tensor
    size: Tensor


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
    """Keep a denominator away from zero: at least the rounding error of a sum whose terms have ``size`` in all."""
    floor = (rounding(mass) * size).clamp(min=tiny())
    return torch.where(mass.abs() < floor, torch.where(mass < 0, -floor, floor), mass)


def summarize(psi: Tensor, v: Tensor, keep: Tensor | None) -> State:
    """Sum over some tokens."""
    psi = outcast(widen(psi), keep)
    values = psi.transpose(-2, -1) @ outcast(widen(v), keep)
    return State(values, psi.sum(-2).unsqueeze(-1), psi.abs().sum(-2).unsqueeze(-1))


def merge(first: State, second: State) -> State:
    """Join the states of two sets of tokens."""
    return State(first.values + second.values, first.mass + second.mass, first.size + second.size)


def read(phi: Tensor, state: State) -> Partial:
    """Attend from queries to the tokens of a state."""
    phi = widen(phi)
    return Partial(phi @ state.values, phi @ state.mass, phi.abs() @ state.size)


def within(phi: Tensor, psi: Tensor, v: Tensor, allowed: Tensor) -> Partial:
    """Attend from n queries to n keys where ``allowed`` (B, H, n, n)."""
    phi, psi = widen(phi), widen(psi)
    kernel = (phi @ psi.transpose(-2, -1)) * allowed
    size = (phi.abs() @ psi.abs().transpose(-2, -1)) * allowed
    return Partial(kernel @ widen(v), kernel.sum(-1, keepdim=True), size.sum(-1, keepdim=True))


def combine(first: Partial, second: Partial) -> Partial:
    """Join what one query got from two sets of tokens."""
    return Partial(first.values + second.values, first.mass + second.mass, first.size + second.size)


def finish(partial: Partial) -> Tensor:
    """Normalise."""
    return partial.values / guard(partial.mass, partial.size)
