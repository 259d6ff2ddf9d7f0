"""The rules for numbers: exponentials and logarithms are taken in float32, products in the input's type.

Functions rather than constants, because TorchScript reads no globals.
"""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if it is float16 or bfloat16, unchanged otherwise."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def never() -> float:
    """Stands for the logarithm of zero: finite, so that the difference of two of them is defined."""
    return -1e30


def rounding(x: Tensor) -> float:
    """Return the relative rounding error of ``x``, which is float32 or float64."""
    return 2.3e-16 if x.dtype == torch.float64 else 1.2e-7


def tiny() -> float:
    """Return the smallest denominator."""
    return 1e-37


def outcast(x: Tensor, keep: Tensor | None, value: float = 0.0) -> Tensor:
    """Return ``x`` with ``value`` where the mask does not keep it."""
    return x if keep is None else x.masked_fill(~keep, value)
