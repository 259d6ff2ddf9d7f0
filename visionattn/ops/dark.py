"""DARKFormer's kernel ``exp(q^T S k)`` with learned ``S = M^T M``, by positive random features of ``M q`` and ``M k``.

With w ~ N(0, I), ``exp(w.Mx - |Mx|^2/2)`` are the features: those of :mod:`~visionattn.ops.performer` after the linear
map M, that is with draws from N(0, S).

Source: DARKFormer (arXiv 2603.04127).
"""

import torch
from torch import Tensor


def log_kernel(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
    """Logarithm of the exact kernel of all pairs, ``(M q).(M k)``, (B, H, N, N), for ``m`` (H, D, D)."""
    q, k = (x @ m.transpose(-2, -1) for x in (q, k))
    return q @ k.transpose(-2, -1)


def whitening(x: Tensor, loading: float = 1e-4) -> Tensor:
    """Return M that makes M x isotropic and leaves its mean square as it is, per head: ``(tr L / D)^(1/2) L^(-1/2)``.

    Source: arXiv 2603.04127, proposition C.1, which leaves the scale open. A feature's relative variance is
    ``exp(|M(q + k)|^2) - 1``, so that a scale by which vectors grow makes noise of all features.

    Args:
        x: queries and keys together, (B, H, N, D); L is their second moment.
        loading: share of the mean eigenvalue added to all of them.

    Returns:
        (H, D, D), in float64.
    """
    x = x.double().transpose(0, 1).flatten(1, 2)
    moment = x.transpose(-2, -1) @ x / x.shape[-2]
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0) + loading * values.mean(-1, keepdim=True)
    size = values.mean(-1)[:, None, None].sqrt()
    return size * (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.transpose(-2, -1)


def optimal_proposal(covariance: Tensor) -> Tensor:
    """Return the covariance of the Gaussian proposal of least variance for ``exp(q.k)`` with q, k ~ N(0, covariance).

    ``(I + 2 L)(I - 2 L)^(-1)``: theorem 3.2 of arXiv 2603.04127. Draws from it carry the importance weight
    ``N(w; 0, I) / N(w; 0, proposal)``.

    Args:
        covariance: L, (D, D), with eigenvalues below 1/2.
    """
    one = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.solve(one - 2 * covariance, one + 2 * covariance)
