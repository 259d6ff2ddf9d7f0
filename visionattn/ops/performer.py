"""Positive random features for the softmax kernel, ``exp(q.k) = E[exp(w.q - |q|^2/2) exp(w.k - |k|^2/2)]``.

The expectation is over w ~ N(0, I); F draws estimate it without bias. The relative variance of one draw is
``exp(|q + k|^2) - 1``.

Source: Rethinking Attention with Performers (arXiv 2009.14794), lemma 1 and section 2.4.
"""

from torch import Tensor

from visionattn.ops.precision import widen

RELU_EPSILON = 1e-3
"""Added to the ReLU features, as in the paper's code."""


def scaled(x: Tensor) -> Tensor:
    """Return ``x / D^(1/4)``: two such vectors have the product ``q.k / sqrt(D)`` of softmax attention."""
    return widen(x) * x.shape[-1] ** -0.25


def exponential_log_features(x: Tensor, draws: Tensor) -> Tensor:
    """Return ``w.x - |x|^2/2``: x (B, H, N, D) and draws (H, F, D) to (B, H, N, F)."""
    x = widen(x)
    return x @ draws.to(x.dtype).transpose(-2, -1) - x.square().sum(-1, keepdim=True) / 2


def relu_log_features(x: Tensor, draws: Tensor, epsilon: float = RELU_EPSILON) -> Tensor:
    """Return ``log(relu(w.x) + epsilon)``, of the same shapes; it does not estimate softmax attention."""
    x = widen(x)
    return ((x @ draws.to(x.dtype).transpose(-2, -1)).clamp(min=0) + epsilon).log()
