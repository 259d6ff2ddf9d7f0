"""The ELU+1 kernel, ``k(q, k) = phi(q).phi(k)`` with ``phi(x) = elu(x) + 1``.

Source: Transformers are RNNs (arXiv 2006.16236), section 3.2.1, equation 7.
"""

from torch import Tensor

from visionattn.ops.precision import widen


def log_features(x: Tensor) -> Tensor:
    """Return ``log(elu(x) + 1)`` without forming the exponential."""
    x = widen(x)
    return x.clamp(max=0) + x.clamp(min=0).log1p()


def log_kernel(q: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N)."""
    phi_q, phi_k = (x.clamp(max=0).exp() + x.clamp(min=0) for x in (q, k))
    return (phi_q @ phi_k.transpose(-2, -1)).log()
