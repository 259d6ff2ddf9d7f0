"""Numbers of the mechanisms' theory, computed from the library's own parts; each is known from elsewhere too."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from visionattn.attention import ATTENTION
from visionattn.attention.dark import DarkAttention
from visionattn.attention.linear import PositiveAttention
from visionattn.ops import dark, gka, slay
from visionattn.profiling.protocols import Inputs, ablation, build, cosines, deviation, output, truth, weighted


def quadrature_errors(nodes: int, epsilon: float, low: float, high: float, points: int = 201) -> Tensor:
    """Return the relative error of SLAY's quadrature at equidistant cosines from low to high."""
    x = torch.linspace(low, high, points, dtype=torch.float64)
    x = x[x != 0]  # where kernel and quadrature both vanish
    exact = yat_sphere(x, epsilon)
    return (slay.quadrature_kernel(x, nodes, epsilon) - exact).abs() / exact


def yat_sphere(x: Tensor, epsilon: float) -> Tensor:
    """Return the spherical Yat kernel of cosines, as it is written down."""
    return x.square() / (2 + epsilon - 2 * x)


def anchor_moment(cosine: float, dim: int, anchors: int, seed: int = 0) -> float:
    """Return the mean product of SLAY's anchor features of two unit vectors, times D (D + 2)."""
    u = torch.zeros(2, dim, dtype=torch.float64)
    u[:, 0], u[1, 0], u[1, 1] = 1.0, cosine, math.sqrt(1 - cosine**2)
    a, b = slay.anchor_log_features(u, slay.anchors(anchors, dim, seed)).exp()
    return float(a @ b) * dim * (dim + 2)


def one_draw(log_product: Callable[[Tensor], Tensor], direction: Tensor) -> tuple[float, float]:
    """Return mean and relative variance of a product of two random features over w ~ N(0, I), by integration.

    Args:
        log_product: the logarithm of the product for draws w (T, D), (T,).
        direction: the only one that it depends on, (D,).
    """
    t = torch.linspace(-40, 40, 80001, dtype=torch.float64)
    density = (-t.square() / 2).exp() / math.sqrt(2 * math.pi) * (t[1] - t[0])
    product = log_product(t.unsqueeze(-1) * direction / direction.norm()).exp()
    mean, second = float(density @ product), float(density @ product.square())
    return mean, second / mean**2 - 1


def slay_feature_spread(nodes: int, node: int, cosine: float, epsilon: float = 1e-3) -> float:
    """Return the relative standard deviation of one of SLAY's random features for the exponential of a node."""
    scale = slay.quadrature(nodes, epsilon)[0][node]
    u = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)

    def log_product(draws: Tensor) -> Tensor:
        logs = slay.exponential_log_features(u.view(1, 1, 2, 2), draws.view(1, 1, -1, 2), [scale], [1.0])
        return logs.sum(-3).flatten()

    return math.sqrt(one_draw(log_product, u.sum(0))[1])


def ablation_errors(tokens: int, seeds: int, bias: bool) -> dict[str, tuple[float, float]]:
    """Return mean relative L2 errors and cosines to the spherical Yat kernel under the protocol of SLAY's ablation.

    The number of features is the paper's for the length: R = 2 and M = P = 8, 16, 32 at 128, 256, 512 tokens.
    """
    size, epsilon, found = tokens // 16, 1e-6, dict[str, list[tuple[float, float]]]()
    protocol = ablation(tokens, bias)
    for seed in range(seeds):
        inputs = protocol.sample(seed)
        x = cosines(inputs)
        target = weighted(yat_sphere(x, epsilon), inputs)
        outputs = {
            "uniform": weighted(torch.ones_like(x), inputs),
            "x^2": weighted(x.square(), inputs),
            "quadrature": weighted(slay.quadrature_kernel(x, 2, epsilon), inputs),
            "endless anchors": weighted((1 + 2 * x.square()) / (2 + epsilon - 2 * x), inputs),
        }
        for poly in ("anchor", "exact"):
            options = {"poly": poly, "nodes": 2, "features": size, "anchors": size, "epsilon": epsilon, "draws": "iid"}
            outputs[poly] = output(build("slay", options, inputs, seed), inputs)
        for name, mixed in outputs.items():
            found.setdefault(name, []).append(deviation(mixed, target))
    return {name: (_mean(e for e, _ in pairs), _mean(c for _, c in pairs)) for name, pairs in found.items()}


def gka_identity_error(dim: int, bandwidth: float, tokens: int = 197) -> float:
    """Return how far GKA, as it is defined and as it runs, lies from softmax attention with a key bias; the largest."""
    x = torch.randn(1, 1, tokens, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = x @ x.transpose(-2, -1) / bandwidth**2 - x.square().sum(-1).unsqueeze(-2) / (2 * bandwidth**2)
    expected = logits.softmax(-1) @ x
    sigma = torch.tensor([bandwidth], dtype=torch.float64)
    defined = gka.log_kernel(x, x, sigma).softmax(-1) @ x
    return max(float((y - expected).abs().max()) for y in (defined, gka.attend(x, x, sigma)))


def gka_self_weight(dim: int, bandwidth: float, tokens: int = 197, heads: int = 8) -> tuple[float, float]:
    """Return the mean weight that a N(0, I) token gives itself, and the entropy of its weights over log(tokens)."""
    x = torch.randn(1, heads, tokens, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logs = gka.log_kernel(x, x, torch.full((heads,), bandwidth, dtype=torch.float64)).log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1) / math.log(tokens)
    return float(logs.exp().diagonal(dim1=-2, dim2=-1).mean()), float(entropy.mean())


def dark_example(draws: int) -> dict[str, float]:
    """Return DARK's kernel of one query and key, its estimate from draws, and the moments of one draw.

    They have the kernel 1.984 and ``|M (q + k)|^2 = log 41.7``; M is of width 4 and not symmetric.
    """
    product, half = math.log(1.984), math.log(41.7) / 2
    length, angle = math.sqrt(half - product), math.acos(product / (half - product))
    layer = DarkAttention(4, 1, features=draws, draws="iid", projections=False).double()
    m = torch.tensor([[2.0, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, -0.4], [0, 0, 0, 0.5]], dtype=torch.float64)
    layer.shift.data = (m - torch.eye(4, dtype=torch.float64)).unsqueeze(0)
    mapped = length * torch.tensor([[1, 0, 0, 0], [math.cos(angle), math.sin(angle), 0, 0]], dtype=torch.float64)
    q, k = torch.linalg.solve(m, mapped.unsqueeze(-1)).view(2, 1, 1, 1, 4) * 4**0.25

    @torch.no_grad()
    def log_product(w: Tensor) -> Tensor:
        layer.draws = w.unsqueeze(0)
        return (layer.log_features(q) + layer.log_features(k)).flatten()

    estimate = float(log_product(layer.draws[0]).exp().mean())
    mean, variance = one_draw(log_product, mapped.sum(0))
    kernel = float(layer.log_target(q, k).detach().exp())
    return {"kernel": kernel, "estimate": estimate, "mean": mean, "relative variance": variance}


def proposal_errors(draws: int, trials: int, seed: int = 0) -> tuple[float, float]:
    """Return mean squared errors of ``exp(q.k)`` by isotropic draws, and by weighted ones of the optimal covariance.

    Queries and keys are N(0, L), of width 8; the variances go from .4 to .005 in geometric steps. The expectation of
    the first is infinite: it grows with the trials.
    """
    generator = torch.Generator().manual_seed(seed)
    variances = proposal_variances()
    proposal = dark.optimal_proposal(torch.diag(variances)).diagonal()
    errors = torch.zeros(2, dtype=torch.float64)
    for start in range(0, trials, 5000):
        size = min(5000, trials - start)
        q, k = torch.randn(2, size, 1, 8, generator=generator, dtype=torch.float64) * variances.sqrt()
        exact = (q * k).sum(-1).exp().squeeze(-1)
        w = torch.randn(size, draws, 8, generator=generator, dtype=torch.float64)
        wide = w * proposal.sqrt()
        log_weights = (w.square() - wide.square() + proposal.log()).sum(-1) / 2
        for i, (points, logs) in enumerate(((w, torch.zeros(())), (wide, log_weights))):
            product = (points * (q + k)).sum(-1) - (q.square() + k.square()).sum(-1) / 2
            errors[i] += ((product + logs).exp().mean(-1) - exact).square().sum()
    isotropic, optimal = (errors / trials).tolist()
    return isotropic, optimal


def proposal_variances() -> Tensor:
    """Return the variances of queries and keys for :func:`proposal_errors`, (8,)."""
    return torch.logspace(math.log10(0.4), math.log10(0.005), 8, dtype=torch.float64)


def optimal_error() -> float:
    """Return the expectation of the second of :func:`proposal_errors` for one draw, in closed form.

    With the optimal proposal the mean square is ``(E exp|q|^2)^2``, and the squared mean ``E exp(2 q.k)``.
    """
    variances = proposal_variances()
    return float(1 / (1 - 2 * variances).prod() - (1 - 4 * variances.square()).prod().rsqrt())


def hadamard_error(scale: float, dtype: torch.dtype, tokens: int = 64) -> float:
    """Return the relative error of ELA's Hadamard kernel, computed by two softmaxes, for logits of a size."""
    drawn = torch.randn(3, 1, 2, tokens, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = Inputs(*(drawn * torch.tensor([scale, scale, 1.0], dtype=torch.float64).view(3, 1, 1, 1, 1))).to(dtype)
    layer = build("ela_hadamard", {}, inputs, 0)
    return deviation(output(layer, inputs), truth(layer, inputs.to(torch.float64)))[0]


def largest_denominator(mechanism: str, tokens: int, dim: int = 64) -> float:
    """Return the largest sum over keys of a kernel that is not normalised, for N(0, 1) queries and keys."""
    q, k = torch.randn(2, 1, 1, tokens, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = ATTENTION[mechanism](dim, 1, projections=False)
    assert isinstance(layer, PositiveAttention)
    return float((layer.log_features(q).exp() @ layer.log_features(k).exp().sum(-2).unsqueeze(-1)).max())


def half_precision_error(mechanism: str, tokens: int, dim: int = 64) -> float:
    """Return the relative error of a mechanism in float16 on N(0, 1) queries and keys."""
    drawn = torch.randn(3, 1, 1, tokens, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = Inputs(*drawn).to(torch.float16)
    wide = inputs.to(torch.float64)
    exact = output(build(mechanism, {}, wide, 0), wide)
    return deviation(output(build(mechanism, {}, inputs, 0), inputs), exact)[0]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
