"""Memory for what kernels write, and what surrounds their calls."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from visionattn.ops.packing import packed_like

P = ParamSpec("P")
R = TypeVar("R")


def output_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory for an output or a gradient, (B, H, N, D) as x is, that lies as (B, N, H, D).

    It is no view of a tensor of another shape: an operator that returns a view forbids its users to change it in place.
    """
    B, H, N, D = x.shape
    return x.new_empty_strided((B, H, N, D), (N * H * D, D, H * D, 1), dtype=dtype)


def gradients_like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the gradients of queries, keys and values: in one packed projection, if they are alike.

    Args:
        q: (B, H, N, D).
        k: (B, H, N, D).
        v: (B, H, N, E).
    """
    if q.shape == v.shape and q.dtype == k.dtype == v.dtype:
        return packed_like(q)
    return output_like(q), output_like(k), output_like(v)


def mask_for(keep: Tensor | None, q: Tensor) -> Tensor | None:
    """Return a key mask, which is broadcastable to (B, H, N, 1), as kernels read it: (B, H, N) of bytes, 0 or 1."""
    return None if keep is None else keep.expand(*q.shape[:3], 1)[..., 0].view(torch.uint8)


def mask_strides(keep: Tensor | None) -> tuple[int, ...]:
    """Return the strides of a mask that kernels read, zeros for none."""
    return (0, 0, 0) if keep is None else keep.stride()


def padded(size: int) -> int:
    """Return a size as kernels have it: a power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


def differentiable_gradients(o: Tensor, inputs: Sequence[Tensor | None], do: Tensor) -> list[Tensor | None]:
    """Return the gradients of those inputs that want one, None for others, so that they have gradients themselves."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(o, wanted, do, create_graph=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Leave autocast in a backward function, which may be called within it; the forward one has left it."""

    @wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return precise
