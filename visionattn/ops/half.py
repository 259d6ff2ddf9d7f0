"""Products of matrices in half precision whose gradients stay within range.

The gradient of a sum over N tokens has entries of order N, although what becomes of it further back is small: float16,
which ends at 65,504, overflows there. In float32 it does not.
"""

from typing import Any

import torch
from torch import Tensor

from visionattn.ops.packing import transformed


def product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x @ y``, multiplied in ``dtype``; gradients of a float16 product are taken in float32.

    Args:
        x: weights, (..., n, m), in float32 at least, whose rows sum to one, so that the product is in the range of y.
        y: what is mixed, (..., m, e).
        dtype: that of the product; the result may be wider.
    """
    if not torch.jit.is_scripting() and dtype == torch.float16:  # type: ignore[attr-defined]
        return _wide_gradients(x, y)
    return x.to(dtype) @ y.to(dtype)


@torch.jit.unused
def _wide_gradients(x: Tensor, y: Tensor) -> Tensor:
    wanted = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if not wanted or torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return x.half() @ y.half()
    if not torch.compiler.is_compiling() and transformed():
        return x @ y.float()
    mixed: Tensor = _HalfProduct.apply(x, y)
    return mixed


class _HalfProduct(torch.autograd.Function):
    """The product is returned in float32: PyTorch rounds gradients to the type of what they are gradients of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return (x.half() @ y.half()).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return gradient @ y.float().transpose(-2, -1), x.transpose(-2, -1) @ gradient
