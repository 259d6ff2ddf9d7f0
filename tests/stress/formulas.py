"""Attention in float64 from the formulas of the papers: the truth that fused kernels are compared with.

Nothing here is taken from the package but random numbers: what a layer drew, and learned, by the names of its state.
Queries, keys and values are (B, H, N, D), ``keep`` is (B, 1, N, 1), True where a key takes part.
"""

import math

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]
MOMENTS = ("ela_sum", "ela_diff", "ela_direction")
SLAY = {"slay": (1, 0.5), "slay_paper": (2, 1e-3)}
"""Nodes of quadrature and epsilon."""
CHUNK = 32


def attend(
    name: str, state: State, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Return the mixed values, (B, H, N, D); zeros for a query without keys."""
    if name in MOMENTS:
        assert not causal
        return _moments(name, q, k, v, keep)
    a, b = (_logs(name, state, x) for x in (q, k))
    if causal:
        assert keep is None
        return _causal(a, b, v)
    return _everywhere(a, b, v, keep)


def _logs(name: str, state: State, x: Tensor) -> Tensor:
    """Return the logarithms of the features."""
    D = x.shape[-1]
    if name == "ela_hadamard":  # ELA (arXiv 2605.18848): the sum of exp(q_f + k_f)
        return x
    if name == "elu":  # arXiv 2006.16236, equation 7: elu(x) + 1
        return torch.where(x > 0, (1 + x.clamp(min=0)).log(), x)
    if name == "relu":  # arXiv 2205.14756, with an epsilon in the kernel
        return (x.clamp(min=0) + 1e-6).log()
    if name == "cosformer":  # arXiv 2202.08791, equation 10: the angle is pi/2 i/N
        angle = (
            torch.arange(x.shape[-2], device=x.device, dtype=x.dtype).div(x.shape[-2]).mul(math.pi / 2).unsqueeze(-1)
        )
        logs = (x.clamp(min=0) + 1e-6).log()
        return torch.cat((logs + angle.cos().log(), logs + angle.sin().log()), -1)
    draws = state["draws"].double()
    if name in SLAY:
        return _slay_logs(*SLAY[name], draws, state["bank"].double(), x)
    x = x * D**-0.25
    if name == "dark":  # arXiv 2603.04127: the features of M x
        x = x + x @ state["shift"].double().transpose(-2, -1)
    return x @ draws.transpose(-2, -1) - x.square().sum(-1, keepdim=True) / 2  # arXiv 2009.14794, lemma 1


def _slay_logs(nodes: int, epsilon: float, draws: Tensor, bank: Tensor, x: Tensor) -> Tensor:
    """SLAY (arXiv 2602.04915): (a.u)^2 of anchors times random features of exp(2 s u.w), for each node s."""
    u = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    square = ((u @ bank.T).square() + 1e-20).log() - math.log(len(bank)) / 2
    roots, weights = np.polynomial.laguerre.laggauss(nodes)
    parts = []
    for root, weight, w in zip(roots / (2 + epsilon), weights / (2 + epsilon), draws, strict=True):
        exponential = math.sqrt(2 * root) * (u @ w.transpose(-2, -1)) - root + math.log(weight / w.shape[-2]) / 2
        parts.append((square.unsqueeze(-1) + exponential.unsqueeze(-2)).flatten(-2))
    return torch.cat(parts, -1)


def _everywhere(a: Tensor, b: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    """Sum exp(a_f + b_f) over features, then values by these weights over all keys."""
    if keep is not None:
        b = b.masked_fill(~keep, -math.inf)
    top = b.detach().amax(-2, keepdim=True).clamp(min=-1e300)
    weights = (b - top).exp()
    shifted = a + top
    read = (shifted - shifted.detach().amax(-1, keepdim=True)).exp()
    mass = read @ weights.sum(-2).unsqueeze(-1)
    mixed = read @ (weights.transpose(-2, -1) @ v)
    return torch.where(mass > 0, mixed / torch.where(mass > 0, mass, 1.0), 0.0)


def _causal(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """The same over the keys up to each token: by all pairs within a chunk, by sums over those before it."""
    top = torch.full_like(b[..., :1, :], -1e300)
    mass, sums = torch.zeros_like(top), v.new_zeros(*b.shape[:2], b.shape[-1], v.shape[-1])
    mixed = []
    for start in range(0, a.shape[-2], CHUNK):
        x, y, z = (t[..., start : start + CHUNK, :] for t in (a, b, v))
        pairs = (x.unsqueeze(-2) + y.unsqueeze(-3)).logsumexp(-1)
        pairs = pairs.masked_fill(~torch.ones_like(pairs, dtype=torch.bool).tril(), -math.inf)
        total = pairs.logsumexp(-1, keepdim=True)
        if start:
            total = torch.logaddexp(total, (x + top + mass.log()).logsumexp(-1, keepdim=True))
        mixed.append((pairs - total).exp() @ z + ((x + top - total).exp() @ sums if start else 0.0))
        higher = torch.maximum(top, y.detach().amax(-2, keepdim=True))
        weights, fade = (y - higher).exp(), (top - higher).exp()
        mass, top = mass * fade + weights.sum(-2, keepdim=True), higher
        sums = sums * fade.transpose(-2, -1) + weights.transpose(-2, -1) @ z
    return torch.cat(mixed, -2)


def _moments(name: str, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    """ELA's kernels (arXiv 2605.18848, section 3), |q + k|^2, |q - k|^2, and direction times magnitude.

    Keys and values are taken from the first of them, which changes nothing and keeps differences exact.
    """
    here = torch.ones_like(k[..., :1]) if keep is None else keep.to(k.dtype).expand_as(k[..., :1])
    count = here.sum(-2, keepdim=True)
    origin = v[..., :1, :].detach()
    x = (v - origin) * here
    if name == "ela_direction":
        size = (k.square().sum(-1, keepdim=True) + 1) * here
        left, right = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        constant, weighted = size.sum(-2, keepdim=True), right * size
        mixed = (size * x).sum(-2, keepdim=True) + left @ (weighted.transpose(-2, -1) @ x)
        mass = constant + left @ weighted.sum(-2).unsqueeze(-1)
    else:
        k = -k if name == "ela_diff" else k
        first = k[..., :1, :].detach()
        q, k = q + first, (k - first) * here
        own, theirs = q.square().sum(-1, keepdim=True) + 1e-6, k.square().sum(-1, keepdim=True)
        mixed = own * x.sum(-2, keepdim=True) + (theirs * x).sum(-2, keepdim=True)
        mixed = mixed + 2 * q @ (k.transpose(-2, -1) @ x)
        mass = own * count + theirs.sum(-2, keepdim=True) + 2 * q @ k.sum(-2).unsqueeze(-1)
    return torch.where(count > 0, origin + mixed / torch.where(count > 0, mass, 1.0), 0.0)
