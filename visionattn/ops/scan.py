"""A linear kernel over tokens in order: the causal form in chunks, and one token at a time."""

from typing import Any, Protocol

import torch
from torch import Tensor

from visionattn.ops.precision import outcast


class Family(Protocol):
    """What a family of kernels offers; a module of :mod:`visionattn.ops` is one.

    ``summarize`` some keys and values into a state of fixed size, ``merge`` two states, ``read`` a state by queries;
    attend ``within`` a few tokens by all pairs; ``combine`` what a query got from two sets of tokens and ``finish`` it.
    """

    def summarize(self, k: Tensor, v: Tensor, keep: Tensor | None, /) -> Any: ...

    def merge(self, first: Any, second: Any, /) -> Any: ...

    def read(self, q: Tensor, state: Any, /) -> Any: ...

    def within(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, /) -> Any: ...

    def combine(self, first: Any, second: Any, /) -> Any: ...

    def finish(self, partial: Any, /) -> Tensor: ...


CHUNK = 32
"""Tokens of a chunk. Within one, memory is that of CHUNK x CHUNK x F numbers a head."""


def causal(family: Family, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attend from each token to itself and those before it, in O(N CHUNK F + N F E) time, with a float32 state.

    Args:
        family: of the kernel.
        q: what the family takes of the queries, (B, H, N, ...).
        k: what it takes of the keys, (B, H, N, ...).
        v: values, (B, H, N, E).
        keep: key mask.
    """
    state, mixed = None, []
    for start in range(0, q.shape[-2], CHUNK):
        q_now, k_now, v_now = (x[..., start : start + CHUNK, :] for x in (q, k, v))
        keep_now = (
            None if keep is None else keep.expand(*keep.shape[:-2], q.shape[-2], 1)[..., start : start + CHUNK, :]
        )
        tokens = q_now.shape[-2]
        allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        if keep_now is not None:
            allowed = allowed & keep_now.transpose(-2, -1)
            k_now, v_now = outcast(k_now, keep_now), outcast(v_now, keep_now)
        partial = family.within(q_now, k_now, v_now, allowed)
        if state is not None:
            partial = family.combine(family.read(q_now, state), partial)
        mixed.append(family.finish(partial))
        state = advanced(family, state, k_now, v_now, keep_now)
    return torch.cat(mixed, -2).to(v.dtype)


def step(family: Family, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Take one token into the state (None at the first) and attend from it; return its mixed values and the state."""
    state = advanced(family, state, k, v, None)
    return family.finish(family.read(q, state)).to(v.dtype), state


def advanced(family: Family, state: Any, k: Tensor, v: Tensor, keep: Tensor | None) -> Any:
    """Return the state with more tokens in it."""
    new = family.summarize(k, v, keep)
    return new if state is None else family.merge(state, new)
