"""Memory that kernels read and write, and what surrounds their calls."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from visionattn.ops.packing import Projection


class View:
    """A view of memory that becomes a tensor only where one is needed: a launch asks for its address alone.

    Args:
        base: the memory.
        shape: of the view.
        strides: of the view, in elements.
        start: element of the memory, as numbers of ``dtype``, where the view begins.
        dtype: of the view.
    """

    __slots__ = ("address", "base", "dtype", "shape", "start", "strides")

    def __init__(
        self, base: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], start: int, dtype: torch.dtype
    ) -> None:
        self.base, self.shape, self.strides, self.start, self.dtype = base, shape, strides, start, dtype
        self.address = base.data_ptr() + start * dtype.itemsize

    def data_ptr(self) -> int:
        """Return the address, as a tensor does."""
        return self.address

    def stride(self) -> tuple[int, ...]:
        """Return the strides, as a tensor does."""
        return self.strides

    def tensor(self) -> Tensor:
        """Return the view."""
        base = self.base if self.dtype == self.base.dtype else self.base.view(self.dtype)
        return base.as_strided(self.shape, self.strides, base.storage_offset() + self.start)


Memory = Tensor | View


@lru_cache(maxsize=1024)
def _layout(
    shape: tuple[int, ...], strides: tuple[int, ...], heads: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return shape and strides of the parts of a packed projection, and the elements between them."""
    (B, N, width), (by_image, by_token, by_channel) = shape, strides
    D = width // (3 * heads)
    return (B, heads, N, D), (by_image, D * by_channel, by_token, by_channel), heads * D * by_channel


def parts_of(inputs: Projection) -> tuple[Memory, Memory, Memory]:
    """Return queries, keys and values, (B, H, N, D) each."""
    x, heads, k, v = inputs
    if k is not None and v is not None:
        return x, k, v
    shape, strides, step = _layout(x.shape, x.stride(), heads)
    return (
        View(x, shape, strides, 0, x.dtype),
        View(x, shape, strides, step, x.dtype),
        View(x, shape, strides, 2 * step, x.dtype),
    )


def by_heads(x: Tensor, inputs: Projection) -> Memory:
    """Return an output, or its gradient, as (B, H, N, E): of packed inputs it is (B, N, H E)."""
    if inputs.k is not None:
        return x
    (B, N, width), (by_image, by_token, by_channel), heads = x.shape, x.stride(), inputs.heads
    E = width // heads
    return View(x, (B, heads, N, E), (by_image, E * by_channel, by_token, by_channel), 0, x.dtype)


def output_for(inputs: Projection) -> Tensor:
    """Return memory for the output: (B, H, N, E) that lies as (B, N, H, E); of packed inputs, (B, N, H E)."""
    x, _, _, v = inputs
    return x.new_empty(*x.shape[:2], x.shape[2] // 3) if v is None else _like(v)


def gradients_for(inputs: Projection) -> Projection:
    """Return memory for the gradients of the inputs, of their form."""
    x, heads, k, v = inputs
    if k is None or v is None:
        return Projection(x.new_empty(x.shape), heads)
    return Projection(_like(x), heads, _like(k), _like(v))


def _like(x: Tensor) -> Tensor:
    """Return memory for a tensor as x is, (B, H, N, D), that lies as (B, N, H, D).

    It is no view of a tensor of another shape: an operator that returns a view forbids its users to change it in place.
    """
    B, H, N, D = x.shape
    return x.new_empty_strided((B, H, N, D), (N * H * D, D, H * D, 1))


def carve(x: Tensor, *pieces: tuple[torch.dtype, int]) -> tuple[View, ...]:
    """Return pieces of one new memory on the device of x, for so many numbers each; they begin at 16 bytes or more."""
    starts, size = [], 0
    for dtype, count in pieces:
        starts.append(size)
        size += -(-count * dtype.itemsize // 16) * 16
    base = x.new_empty(size // 4, dtype=torch.float32)
    return tuple(
        View(base, (count,), (1,), start // dtype.itemsize, dtype)
        for (dtype, count), start in zip(pieces, starts, strict=True)
    )


def mask_for(keep: Tensor | None, inputs: Projection) -> Tensor | None:
    """Return a key mask, which is broadcastable to (B, H, N, 1), as kernels read it: (B, H, N) of bytes, 0 or 1."""
    return None if keep is None else keep.expand(*inputs.shapes()[0][:3], 1)[..., 0].view(torch.uint8)


def mask_strides(keep: Tensor | None) -> tuple[int, ...]:
    """Return the strides of a mask that kernels read, zeros for none."""
    return (0, 0, 0) if keep is None else keep.stride()


def padded(size: int) -> int:
    """Return a size as kernels have it: a power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


def present(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Return tensors as an operator does, which has an empty one like x in place of None."""
    return tuple(x.new_empty(0) if one is None else one for one in tensors)


def eager_gradients(
    formula: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Projection, do: Tensor, *others: Tensor | None
) -> list[Tensor | None]:
    """Differentiate the eager formula, so that the gradients have gradients themselves.

    A backward function may be called within autocast, which the forward one has left.

    Args:
        formula: of queries, keys and values, (B, H, N, D) each.
        inputs: what the output is made of.
        do: gradient of the output, which is packed if the inputs are.
        others: what the formula depends on besides.

    Returns:
        The gradients of the inputs' x, k and v and of the others; None for those that want none.
    """
    x, heads, k, v = inputs
    x, k, v = x.view_as(x), *(None if i is None else i.view_as(i) for i in (k, v))  # one may depend on another
    with torch.autocast(do.device.type, enabled=False):
        o = formula(*Projection(x, heads, k, v).parts())
        if k is None:
            o = o.transpose(1, 2).flatten(2)
        sources = [x, k, v, *others]
        wanted = [one for one in sources if one is not None and one.requires_grad]
        found = iter(torch.autograd.grad(o, wanted, do, create_graph=True))
    return [next(found) if one is not None and one.requires_grad else None for one in sources]
