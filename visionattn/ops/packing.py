"""Queries, keys and values of tokens, apart or in the packed projection that they are parts of."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Projection(NamedTuple):
    """What attention takes of the tokens.

    Attributes:
        x: queries, (B, H, N, D); without keys and values the packed projection, (B, N, 3 H D), of equal widths.
        heads: H.
        k: keys, (B, H, N, D).
        v: values, (B, H, N, E).
    """

    x: Tensor
    heads: int
    k: Tensor | None = None
    v: Tensor | None = None

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values."""
        if self.k is not None and self.v is not None:
            return self.x, self.k, self.v
        return unpack(self.x, self.heads, self.x.shape[-1] // (3 * self.heads))

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of queries, keys and values."""
        if self.k is not None and self.v is not None:
            return self.x.shape, self.k.shape, self.v.shape
        B, N, width = self.x.shape
        one = B, self.heads, N, width // (3 * self.heads)
        return one, one, one


def unpack(x: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of a packed projection, (B, N, 3 H D) to (B, H, N, D) each, as views.

    H and D are given: of an empty batch neither could be found out, and exporters keep what is found out.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return views(x, heads, width)
    B, N, _ = x.shape  # three operators in place of ten, where each costs time
    q, k, v = x.view(B, N, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def views(x: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`unpack` does in the form that all exporters understand."""
    B, N, _ = x.shape
    q, k, v = [part.reshape(B, N, heads, width).transpose(1, 2) for part in x.chunk(3, -1)]
    return q, k, v


def transformed() -> bool:
    """Say whether torch.func or forward-mode differentiation is at work, which our operators know nothing of."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
