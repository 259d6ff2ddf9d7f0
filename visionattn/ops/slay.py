"""SLAY's features for the spherical Yat kernel, ``x^2 / (C - 2 x)`` of a cosine x, with C = 2 + epsilon.

The kernel is a mixture, ``int_0^inf exp(-s C) x^2 exp(2 s x) ds``, of which R nodes of Gauss-Laguerre quadrature are
kept: ``sum_r w_r x^2 exp(2 s_r x)``. The polynomial gets one of the maps below, of P features, the exponential gets M
positive random features a node (draws (R, H, M, D)); their products are F = R P M features in all.

Source: SLAY (arXiv 2602.04915), sections 3 and 4. Here ``u`` are unit vectors (B, H, N, D).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

FLOOR = 1e-20
"""Added to squares before their logarithm is taken."""


def quadrature(nodes: int, epsilon: float) -> tuple[list[float], list[float]]:
    """Return the scales s_r and weights w_r of the R nodes."""
    roots, weights = np.polynomial.laguerre.laggauss(nodes)
    return (roots / (2 + epsilon)).tolist(), (weights / (2 + epsilon)).tolist()


def quadrature_kernel(x: Tensor, nodes: int, epsilon: float) -> Tensor:
    """Return what features with an exact polynomial map estimate without bias, for cosines x of any shape."""
    scales, weights = quadrature(nodes, epsilon)
    return sum((w * (2 * s * x).exp() for s, w in zip(scales, weights, strict=True)), torch.zeros_like(x)) * x.square()


def exponential_log_features(u: Tensor, draws: Tensor, scales: list[float], weights: list[float]) -> Tensor:
    """Return the logarithms of the features of all nodes' exponentials, weights included, (B, H, N, R, M)."""
    logs = []
    for r in range(len(scales)):
        constant = math.log(weights[r] / draws.shape[-2]) / 2 - scales[r]
        logs.append(math.sqrt(2 * scales[r]) * (u @ draws[r].to(u.dtype).transpose(-2, -1)) + constant)
    return torch.stack(logs, -2)


def anchor_log_features(u: Tensor, anchors: Tensor, floor: float = FLOOR) -> Tensor:
    """Return ``log (u.a_p)^2`` for anchors (P, D), (B, H, N, P).

    Their inner product is not x^2 on average, but ``(1 + 2 x^2) / (D (D + 2))``.
    """
    return ((u @ anchors.to(u.dtype).transpose(-2, -1)).square() + floor).log() - math.log(len(anchors)) / 2


def exact_features(u: Tensor, bank: Tensor | None = None) -> Tensor:
    """Return the D (D + 1) / 2 products of entries, whose inner product is x^2 exactly; there is no bank."""
    D = u.shape[-1]
    pairs = torch.triu_indices(D, D, device=u.device)
    weights = (2 - (pairs[0] == pairs[1]).to(u.dtype)).sqrt()
    return u.index_select(-1, pairs[0]) * u.index_select(-1, pairs[1]) * weights


def nystrom_features(u: Tensor, anchors: Tensor, ridge: float = 1e-3) -> Tensor:
    """Return ``k(u, A) (k(A, A) + ridge I)^(-1/2)`` for k = x^2 and anchors A (P, D); signed and biased."""
    anchors = anchors.to(u.dtype)
    gram = (anchors @ anchors.T).square()
    values, vectors = torch.linalg.eigh(gram + ridge * torch.eye(len(gram), dtype=u.dtype, device=u.device))
    return (u @ anchors.T).square() @ (vectors * values.rsqrt()) @ vectors.T


def maclaurin_features(u: Tensor, signs: Tensor) -> Tensor:
    """Return ``(r.u)(r'.u) / sqrt(P)`` for pairs of random signs (2, P, D); signed, without bias for x^2.

    Source: Random Feature Maps for Dot Product Kernels (arXiv 1201.6530), algorithm 1, for degree 2.
    """
    first, second = u @ signs[0].to(u.dtype).T, u @ signs[1].to(u.dtype).T
    return first * second * signs.shape[1] ** -0.5


def tensorsketch_features(u: Tensor, sketches: Tensor) -> Tensor:
    """Return the circular convolution of two count sketches (2, P, D) of u; signed, without bias for x^2.

    Source: Fast and Scalable Polynomial Kernels via Explicit Feature Maps (KDD 2013), section 3. P is small here, so
    the convolution is taken directly, in P^2 products a token, not by Fourier transform.
    """
    first, second = u @ sketches[0].to(u.dtype).T, u @ sketches[1].to(u.dtype).T
    places = torch.arange(sketches.shape[1], device=u.device)
    turned = (places.unsqueeze(-1) - places) % sketches.shape[1]
    shifted = second.index_select(-1, turned.flatten()).reshape(u.shape[:-1] + turned.shape)
    return (shifted @ first.unsqueeze(-1)).squeeze(-1)


def anchors(features: int, dim: int, seed: int) -> Tensor:
    """Draw unit vectors, (P, D)."""
    drawn = torch.from_numpy(np.random.default_rng(seed).standard_normal((features, dim)))
    return torch.nn.functional.normalize(drawn, dim=-1).bfloat16().float()


def signs(features: int, dim: int, seed: int) -> Tensor:
    """Draw pairs of random signs, (2, P, D)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, (2, features, dim))) * 2.0 - 1


def count_sketches(features: int, dim: int, seed: int) -> Tensor:
    """Draw two count sketches, (2, P, D): every entry of u goes, with a random sign, to one random feature."""
    generator = np.random.default_rng(seed)
    places = torch.from_numpy(generator.integers(0, features, (2, 1, dim)))
    sign = torch.from_numpy(generator.integers(0, 2, (2, 1, dim))) * 2.0 - 1
    return torch.zeros(2, features, dim, device="cpu").scatter(1, places, sign)


def nothing(features: int, dim: int, seed: int) -> Tensor:
    """Draw nothing."""
    return torch.empty(0, device="cpu")


POLYNOMIALS: dict[str, tuple[Callable[[int, int, int], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "anchor": (anchors, anchor_log_features),
    "exact": (nothing, exact_features),
    "nystrom": (anchors, nystrom_features),
    "maclaurin": (signs, maclaurin_features),
    "tensorsketch": (count_sketches, tensorsketch_features),
}
"""How to draw a map's bank, of P, D and a seed, and its features, of unit vectors and the bank."""


def product(polynomial: Tensor, exponential: Tensor) -> Tensor:
    """Return all products of the P features of the polynomial with the R M of the exponential, (B, H, N, R P M)."""
    return (polynomial.unsqueeze(-2).unsqueeze(-1) * exponential.unsqueeze(-2)).flatten(-3)


def log_product(polynomial: Tensor, exponential: Tensor) -> Tensor:
    """The same of logarithms."""
    return (polynomial.unsqueeze(-2).unsqueeze(-1) + exponential.unsqueeze(-2)).flatten(-3)
