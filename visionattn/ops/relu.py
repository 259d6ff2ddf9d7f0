"""The ReLU kernel, ``k(q, k) = phi(q).phi(k)`` with ``phi(x) = relu(x) + EPSILON``.

Source: EfficientViT (arXiv 2205.14756), section 3.1, whose epsilon stands in the denominator instead: here it belongs
to the kernel, which thus is positive, and a query without a positive entry still attends.
"""

from torch import Tensor

from visionattn.ops.precision import widen

EPSILON = 1e-6


def features(x: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Return ``relu(x) + epsilon``."""
    return x.clamp(min=0) + epsilon


def log_features(x: Tensor) -> Tensor:
    """Return the logarithm of the features, elementwise."""
    return features(widen(x)).log()


def log_kernel(q: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N)."""
    return (features(q) @ features(k).transpose(-2, -1)).log()
