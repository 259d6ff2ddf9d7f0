"""MALA's weights, ``(1 + 1/z_i) a_ij / N - z_i / N`` with ``a_ij = s phi(q_i).phi(k_j)`` and z_i its mean over keys.

Here ``phi(x) = elu(x) + 1`` and ``s = D^(-1/2)``. The weights sum to one: they are those of linear attention, whose
deviation from 1/N is 1 + z_i times as large, so a longer query attends more sharply. They may be negative.

In the terms of :mod:`visionattn.ops.signed`, the mean value plus the correction times ``1 + 1/z``; InLine
(:mod:`visionattn.ops.inline`) has the correction alone.

Source: MALA (arXiv 2507.00698), section 3, and its code, whose products are means over the keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops import signed
from visionattn.ops.precision import widen
from visionattn.ops.signed import Deviation, Partial, combine, guard, merge, read, summarize, within

__all__ = ["combine", "features", "finish", "linear", "merge", "read", "summarize", "weights", "within"]


def features(x: Tensor) -> Tensor:
    """Return ``D^(-1/4) (elu(x) + 1)`` of queries or keys, whose products are a."""
    return (F.elu(widen(x)) + 1) * x.shape[-1] ** -0.25


def linear(phi: Tensor, psi: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attend over all tokens in O(N D E) time, in float32 whatever the type of the values."""
    return _amplified(signed.deviation(phi, psi, v, keep)).to(v.dtype)


def finish(partial: Partial) -> Tensor:
    """Add the amplified correction to the mean value; nothing attended to gives zeros."""
    return _amplified(signed.deviation_of(partial)) * (partial.tokens > 0)


def weights(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """Return the weights of all pairs, (B, H, N, N), where ``allowed`` (B, H, N, N)."""
    count = allowed.sum(-1, keepdim=True).clamp(min=1)
    kernel = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1) * q.shape[-1] ** -0.5
    kernel = torch.where(allowed, kernel, 0.0)
    z = torch.where(allowed.any(-1, keepdim=True), kernel.sum(-1, keepdim=True) / count, 1.0)
    return torch.where(allowed, ((1 + 1 / z) * kernel - z) / count, 0.0)


def _amplified(found: Deviation) -> Tensor:
    return found.mean + found.correction + found.correction / guard(found.mass, found.size)
