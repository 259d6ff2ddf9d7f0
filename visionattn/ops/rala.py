"""RALA's kernel, ``k(q, k_j) = phi(q).phi(k_j) exp(s g.phi(k_j))`` with ``phi(x) = elu(x) + 1`` and ``s = D^(-1/2)``.

The mean feature g of all queries asks once how much each key matters, and all queries share the answer. The source
writes ``N softmax_j(s g.phi(k_j))`` for the exponential: what that has besides is common to all keys and cancels.

Source: RALA (arXiv 2411.07635), section 3, and its code.
"""

import torch.nn.functional as F
from torch import Tensor

from visionattn.ops import elu
from visionattn.ops.precision import outcast


def log_features(q: Tensor, k: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the features of queries and keys, (B, H, N, D) each."""
    a, b = elu.log_features(q), elu.log_features(k)
    logits = b.exp() @ mean_feature(a.exp(), keep).transpose(-2, -1) * q.shape[-1] ** -0.5
    return a, b + logits


def log_kernel(q: Tensor, k: Tensor, keep: Tensor | None = None) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N)."""
    mean = mean_feature(F.elu(q) + 1, keep)
    logits = mean @ (F.elu(k) + 1).transpose(-2, -1) * q.shape[-1] ** -0.5
    return elu.log_kernel(q, k) + logits


def mean_feature(features: Tensor, keep: Tensor | None) -> Tensor:
    """Return g, (B, H, 1, D), of the features of queries (B, H, N, D): those of padding do not count."""
    features = outcast(features, keep)
    if keep is None:
        return features.mean(-2, keepdim=True)
    return features.sum(-2, keepdim=True) / keep.sum(-2, keepdim=True).clamp(min=1)
