"""Which setting of SLAY is nearest to spherical Yat attention, for a budget of features."""

import math
import statistics
from collections.abc import Iterator, Sequence

import torch

from visionattn.attention.slay import SlayAttention
from visionattn.profiling.protocols import (
    Inputs,
    Number,
    Options,
    Protocol,
    Result,
    Spread,
    build,
    cosines,
    deviation,
    weighted,
)
from visionattn.profiling.theory import yat_sphere

BUDGETS = (64, 256, 1024, None)
"""Features F of SLAY that a choice is made for; None for any number."""

SETTINGS = (("anchor", 2, 16, 8), ("anchor", 1, 16, 16), ("anchor", 2, 16, 32), ("anchor", 1, 32, 32))
"""Of the choices of SLAY, those that are shown everywhere: poly, R, M, P. The first is the paper's."""


class Choice(Result):
    """A setting of SLAY and its relative L2 error to spherical Yat attention of the same epsilon.

    Attributes:
        protocol: of the inputs.
        head_dim: D.
        epsilon: of the kernel.
        budget: features that it is the best of its kind for; None without limit, or if it was not chosen but given.
        poly: polynomial map.
        nodes: R.
        features: M.
        anchors: P.
        size: F = R P M.
        error: over seeds.
        uniform: error of uniform attention.
        square: error of ``x^2``.
    """

    protocol: str
    head_dim: int
    epsilon: float
    budget: int | None
    poly: str
    nodes: int
    features: int
    anchors: int
    size: int
    error: Spread
    uniform: Number
    square: Number


def sweep_slay(protocol: Protocol, epsilons: Sequence[float], seeds: int, most: int = 4096) -> list[Choice]:
    """Try SLAY's settings on some inputs.

    Args:
        protocol: of the inputs.
        epsilons: of the kernel.
        seeds: how many.
        most: features F at most, except for the exact map, which has D (D + 1) / 2 for each of M R.
    """
    found: dict[tuple[float, str, int, int, int], list[float]] = {}
    for seed in range(seeds):
        for key, error in _sweep_one(protocol.sample(seed).to(torch.float32), epsilons, seed, most):
            found.setdefault(key, []).append(error)
    means = {key: statistics.fmean(errors) for key, errors in found.items()}
    return [
        Choice(
            protocol=protocol.name,
            head_dim=protocol.head_dim,
            epsilon=epsilon,
            budget=None,
            poly=poly,
            nodes=nodes,
            features=features,
            anchors=anchors,
            size=nodes * features * anchors,
            error=Spread.of(errors),
            uniform=means[epsilon, "uniform", 0, 0, 0],
            square=means[epsilon, "x^2", 0, 0, 0],
        )
        for (epsilon, poly, nodes, features, anchors), errors in found.items()
        if nodes
    ]


@torch.no_grad()
def _sweep_one(
    inputs: Inputs, epsilons: Sequence[float], seed: int, most: int
) -> Iterator[tuple[tuple[float, str, int, int, int], float]]:
    """Yield the error of every setting: epsilon, poly, R, M, P."""
    x, dim = cosines(inputs), inputs.q.shape[-1]
    squares = {("exact", dim * (dim + 1) // 2): x.square()}
    for poly in ("anchor", "nystrom", "maclaurin", "tensorsketch"):
        for anchors in (n for n in (4, 8, 16, 32, 64, 128, 256) if 2 * n <= most):
            layer = _slay(inputs, {"poly": poly, "anchors": anchors}, seed)
            squares[poly, anchors] = layer.square_kernel(inputs.q, inputs.k)
    for epsilon in epsilons:
        target = weighted(yat_sphere(x, epsilon), inputs)
        yield (epsilon, "uniform", 0, 0, 0), deviation(weighted(torch.ones_like(x), inputs), target)[0]
        yield (epsilon, "x^2", 0, 0, 0), deviation(weighted(x.square(), inputs), target)[0]
        for nodes in (1, 2, 3):
            for features in (2, 4, 8, 16, 32, 64):
                layer = _slay(inputs, {"nodes": nodes, "features": features, "epsilon": epsilon}, seed)
                exponential = layer.exponential_kernel(inputs.q, inputs.k)
                for (poly, anchors), square in squares.items():
                    if poly == "exact" or nodes * features * anchors <= most:
                        error = deviation(weighted(square * exponential, inputs), target)[0]
                        yield (epsilon, poly, nodes, features, anchors), error


def _slay(inputs: Inputs, options: Options, seed: int) -> SlayAttention:
    layer = build("slay", options, inputs, seed)
    assert isinstance(layer, SlayAttention)
    return layer


def best(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choice of least error for each epsilon and budget: positive features, exact map, signed features."""
    kinds = (("anchor",), ("exact",), ("nystrom", "maclaurin", "tensorsketch"))
    found = []
    for epsilon in dict.fromkeys(c.epsilon for c in choices):
        for budget in BUDGETS:
            for kind in kinds:
                fitting = [
                    c for c in choices if c.epsilon == epsilon and c.poly in kind and c.size <= (budget or math.inf)
                ]
                if fitting:
                    chosen = min(fitting, key=lambda c: c.error.mean)
                    found.append(chosen.model_copy(update={"budget": budget}))
    return found
