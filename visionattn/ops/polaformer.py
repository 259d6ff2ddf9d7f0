"""PolaFormer's two kernels, of entries of the same and of opposite sign.

With ``x+ = relu(x) / s``, ``x- = relu(-x) / s`` and a power p > 1, both learned for every channel,

    same(q, k) = (q+)^p.(k+)^p + (q-)^p.(k-)^p,    opposite(q, k) = (q-)^p.(k+)^p + (q+)^p.(k-)^p.

Each is normalised by itself. The first half of the value channels of a head is mixed by ``same``, the rest by
``opposite``. The features of keys are common to both; those of queries change places.

Source: PolaFormer (arXiv 2501.15061), section 4, and its code. The small constant that the ReLU has here belongs to the
kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops import relu
from visionattn.ops.precision import widen


def powers(power: Tensor) -> Tensor:
    """Return p, from 1 to 5, of what is learned for it, of any shape."""
    return 1 + 4 * widen(power).sigmoid()


def log_features(x: Tensor, scale: Tensor, power: Tensor) -> Tensor:
    """Return the logarithms of ``[(x+)^p; (x-)^p]``, (B, H, N, 2 D).

    Args:
        x: queries or keys, (B, H, N, D).
        scale: inverse softplus of s, (H, 1, D).
        power: what p is made of, (H, 1, D).
    """
    x, p = widen(x) / F.softplus(widen(scale)), powers(power)
    return torch.cat((p * relu.features(x).log(), p * relu.features(-x).log()), -1)


def swapped(a: Tensor) -> Tensor:
    """Return the features of queries, (B, H, N, 2 D), for the other kernel."""
    positive, negative = a.chunk(2, -1)
    return torch.cat((negative, positive), -1)


def log_kernels(q: Tensor, k: Tensor, scale: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of ``same`` and ``opposite`` of all pairs, (B, H, N, N) each, from the powers themselves."""
    s, p = F.softplus(scale), powers(power)
    q_plus, q_minus, k_plus, k_minus = (relu.features(x / s) ** p for x in (q, -q, k, -k))
    k_plus, k_minus = k_plus.transpose(-2, -1), k_minus.transpose(-2, -1)
    return (q_plus @ k_plus + q_minus @ k_minus).log(), (q_minus @ k_plus + q_plus @ k_minus).log()
