"""The ELU+1 kernel, ``k(q, k) = phi(q).phi(k)`` with ``phi(x) = elu(x) + 1``.

Source: Transformers are RNNs (arXiv 2006.16236), section 3.2.1, equation 7. Because phi is positive and elementwise,
``phi(q_d) phi(k_d) = exp(log phi(q_d) + log phi(k_d))``: the stable form of the Hadamard kernel computes it exactly,
with no epsilon in the denominator.
"""

from torch import Tensor

from visionattn.ops import ela_hadamard
from visionattn.ops.precision import widen


def log_feature(x: Tensor) -> Tensor:
    """Return ``log(elu(x) + 1)`` without forming the exponential; float32 for half-precision input."""
    x = widen(x)
    return x.clamp(max=0) + x.clamp(min=0).log1p()


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel through its explicit N x N matrix.

    Args:
        q: queries, (B, H, N, D).
        k: keys, (B, H, N, D).
        v: values, (B, H, N, E).
    """
    phi_q, phi_k = (x.clamp(max=0).exp() + x.clamp(min=0) for x in (q, k))
    kernel = phi_q @ phi_k.transpose(-2, -1)
    return kernel / kernel.sum(-1, keepdim=True) @ v


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel in O(N D E) time and O(N (D + E)) memory; same arguments and, up to rounding, same result."""
    return ela_hadamard.linear(log_feature(q), log_feature(k), v)
