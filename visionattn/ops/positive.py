"""Kernels with positive features, ``k(q, k) = sum_f exp(a_f(q) + b_f(k))``, given by the logarithms a and b.

With ``l_f = log sum_j exp(b_f(k_j))`` the normalised output is

    y_i = sum_f softmax_f(a(q_i) + l)_f * (sum_j softmax_j(b_f(k_j)) v_j),

two ordinary softmaxes: F value slots, filled over the tokens and read by each query. There is no epsilon and no
denominator that could vanish or overflow, and the output is a convex mix of the values.

Here ``a`` is (B, H, N, F) for the queries and ``b`` is (B, H, N, F) for the keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.ops.half import product
from visionattn.ops.precision import never, outcast, widen


class State(NamedTuple):
    """What F slots hold of the tokens so far: ``log_mass`` (B, H, 1, F) and ``slots`` (B, H, F, E)."""

    log_mass: Tensor
    slots: Tensor


class Partial(NamedTuple):
    """Attention to some of the tokens: their mixed values (B, H, N, E) and the log of their mass (B, H, N, 1)."""

    mixed: Tensor
    log_mass: Tensor


def linear(a: Tensor, b: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attend over all tokens in O(N F E) time."""
    a, b = widen(a), outcast(widen(b), keep, never())
    top = b.detach().amax(-2, keepdim=True)
    weights = (b - top).exp()
    # The mean, not the sum, so that half-precision exports stay finite; log N is common to all slots and cancels.
    mass = weights.mean(-2, keepdim=True)
    shares = weights / b.shape[-2] / mass
    log_mass = top + mass.log()
    slots = product(shares.transpose(-2, -1), outcast(v, keep), v.dtype)
    return product((a + log_mass).softmax(-1), slots, v.dtype).to(v.dtype)


def summarize(b: Tensor, v: Tensor, keep: Tensor | None) -> State:
    """Fill the slots with some tokens."""
    b = outcast(widen(b), keep, never())
    return State(b.logsumexp(-2, keepdim=True), b.softmax(-2).transpose(-2, -1) @ outcast(widen(v), keep))


def merge(first: State, second: State) -> State:
    """Join the states of two sets of tokens."""
    share = (first.log_mass - second.log_mass).sigmoid().transpose(-2, -1)
    slots = second.slots + share * (first.slots - second.slots)
    return State(torch.logaddexp(first.log_mass, second.log_mass), slots)


def read(a: Tensor, state: State) -> Partial:
    """Attend from queries to the tokens of a state."""
    logits = widen(a) + state.log_mass
    return Partial(logits.softmax(-1) @ state.slots, logits.logsumexp(-1, keepdim=True))


def within(a: Tensor, b: Tensor, v: Tensor, allowed: Tensor) -> Partial:
    """Attend from n queries to n keys where ``allowed`` (B, H, n, n), in O(n^2 F) memory."""
    return explicit((widen(a).unsqueeze(-2) + widen(b).unsqueeze(-3)).logsumexp(-1), v, allowed)


def explicit(log_kernel: Tensor, v: Tensor, allowed: Tensor) -> Partial:
    """Attend by the logarithm of the kernel of all pairs, (B, H, n, n), where ``allowed``."""
    log_kernel = log_kernel.masked_fill(~allowed, never())
    weights = log_kernel.softmax(-1) * allowed
    return Partial(weights @ widen(v), log_kernel.logsumexp(-1, keepdim=True))


def combine(first: Partial, second: Partial) -> Partial:
    """Join what one query got from two sets of tokens."""
    share = (first.log_mass - second.log_mass).sigmoid()
    mixed = second.mixed + share * (first.mixed - second.mixed)
    return Partial(mixed, torch.logaddexp(first.log_mass, second.log_mass))


def finish(partial: Partial) -> Tensor:
    """Return the mixed values."""
    return partial.mixed
