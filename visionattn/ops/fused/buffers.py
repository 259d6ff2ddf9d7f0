"""Memory for what kernels write, and what surrounds their calls."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from visionattn.ops.packing import packed_like

P = ParamSpec("P")
R = TypeVar("R")


def output_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory for an output, (B, N, H, D), for x (B, H, N, D).

    It is not transposed here: an operator that returns a view forbids its users to change it in place.
    """
    B, H, N, D = x.shape
    return x.new_empty(B, N, H, D, dtype=dtype)


def gradient_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory for a gradient, (B, H, N, D), that lies as (B, N, H, D)."""
    return output_like(x, dtype).transpose(1, 2)


def gradients_like(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the gradients of queries, keys and values: in one packed projection, if they are alike.

    Args:
        q: (B, H, N, D).
        k: (B, H, N, D).
        v: (B, H, N, E).
        dtype: of the gradients of queries and keys, if not theirs.
    """
    if dtype is None and q.shape == v.shape and q.dtype == k.dtype == v.dtype:
        return packed_like(q)
    return gradient_like(q, dtype), gradient_like(k, dtype), gradient_like(v)


def padded(size: int) -> int:
    """Return a size as kernels have it: a power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


def differentiable_gradients(o: Tensor, inputs: Sequence[Tensor | None], do: Tensor) -> list[Tensor | None]:
    """Return the gradients of those inputs that want one, None for others, so that they have gradients themselves."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(o, wanted, do, create_graph=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """Make the device of the first argument the current one, on whose stream Triton launches."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return function(*args, **kwargs)

    return guarded


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Leave autocast in a backward function, which may be called within it; the forward one has left it."""

    @wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return precise
