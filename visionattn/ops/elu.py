"""The ELU+1 kernel, ``k(q, k) = phi(q).phi(k)`` with ``phi(x) = elu(x) + 1``.

Source: Transformers are RNNs (arXiv 2006.16236), section 3.2.1, equation 7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops.precision import widen


def log_features(x: Tensor) -> Tensor:
    """Return ``log(elu(x) + 1)`` without forming the exponential."""
    x = widen(x)
    return torch.where(x > 0, x.clamp(min=0).log1p(), x)


def log_kernel(q: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N)."""
    return ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)).log()
