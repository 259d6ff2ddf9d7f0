"""Focused attention's kernel, ``k(q, k) = f(q).f(k)`` with ``f(x) = a^p |a| / |a^p|`` and ``a = (relu(x) + e) / s``.

The power p is taken of each channel and sharpens the direction; the norms, over the channels of all heads, give the
vector its length back. The query's length cancels in normalising; that of a key is its weight, in all heads alike.
The divisor s > 0, one a channel, is learned.

Source: FLatten Transformer (arXiv 2308.00442), section 4.1, and its code. The small constant e belongs to the kernel.
"""

import torch.nn.functional as F
from torch import Tensor

from visionattn.ops import relu
from visionattn.ops.precision import widen


def divided(x: Tensor, scale: Tensor) -> Tensor:
    """Return log a, (B, H, N, D), of queries or keys; ``scale`` is (H, 1, D), the inverse softplus of s."""
    return relu.log_features(x) - F.softplus(widen(scale)).log()


def log_features(x: Tensor, scale: Tensor, power: float) -> Tensor:
    """Return log f(x), (B, H, N, D); no power is ever formed."""
    logs = divided(x, scale)
    before, after = ((2 * y).logsumexp((1, 3), keepdim=True) for y in (logs, power * logs))
    return power * logs + (before - after) / 2


def log_kernel(q: Tensor, k: Tensor, scale: Tensor, power: float) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N), from the powers themselves."""
    features = []
    for x in (q, k):
        a = relu.features(x) / F.softplus(scale)
        lengths = [y.square().sum((1, 3), keepdim=True).sqrt() for y in (a, a**power)]
        features.append(a**power * lengths[0] / lengths[1])
    return (features[0] @ features[1].transpose(-2, -1)).log()
