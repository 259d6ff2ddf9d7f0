"""The one rule for half precision: exponentials and logarithms are taken in float32, products in the input's type."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if it is float16 or bfloat16, unchanged otherwise."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
