"""Launches of the kernels of projected feature maps."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn.ops.fused import projected as kernels
from visionattn.ops.fused.buffers import Memory, View, carve, output_for, padded
from visionattn.ops.fused.launch import Launch, Option, lowered, on
from visionattn.ops.fused.maps import FeatureMap
from visionattn.ops.fused.plan import Plan, plan_projected, plan_projected_backward, smaller
from visionattn.ops.fused.sizes import Sizes
from visionattn.ops.fused.tiles import LOG2E
from visionattn.ops.packing import Projection

KINDS = {"random": kernels.RANDOM.value, "sphere": kernels.SPHERE.value}


class Prepared(NamedTuple):
    """A launch with the sizes of the memory that it needs: its plan, the heads of all images, the padded F and E."""

    launch: Launch
    plan: Plan
    heads: int
    features: int
    values: int


def _constants(sizes: Sizes) -> tuple[tuple[int, int, int], tuple[Any, ...]]:
    """Return the padded F, D and E, and the constants of compilation that both kernels begin with."""
    D, (nodes, _, each, _) = sizes.queries[-1], sizes.draws
    count = nodes * each * sizes.banks
    F, wide, E = padded(count), padded(D), padded(sizes.width)
    return (F, wide, E), (count, D, sizes.width, F, wide, E, padded(sizes.banks))


def _scaled(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return natural logarithms as logarithms to base 2."""
    return tuple(LOG2E.value * x for x in values)


def _plain(sizes: Sizes) -> bool:
    """Say whether the map is a projection and nothing else."""
    return sizes.kind == "random" and not sizes.flags[0]


@lru_cache(maxsize=1024)
def _prepared_forward(sizes: Sizes) -> Prepared:
    (F, D, E), constants = _constants(sizes)
    B, H, N, _ = sizes.queries
    best = plan_projected(N, B * H, F, max(D, E), _plain(sizes))
    (gains, priors, square), (warped, masked, save) = sizes.numbers, sizes.flags
    strides = (*chain(*sizes.strides), N * H * sizes.width, sizes.width, H * sizes.width)
    options = []
    for plan in smaller(best):
        arguments = (
            *(_scaled(gains), _scaled(priors), LOG2E.value * square, sizes.draws[2], sizes.banks),
            *(*strides, H, N, B * H, plan.chunks, plan.readers),
            *(*constants, plan.block, plan.query_block, plan.unit, plan.tile, plan.stages, KINDS[sizes.kind]),
            *(warped, masked, plan.whole, save, plan.hold, "ieee"),
        )
        options.append(Option((B * H * (F // plan.unit * plan.chunks + plan.readers),), arguments, plan.warps))
    return Prepared(Launch(kernels.forward, options), best, B * H, F, E)


@lru_cache(maxsize=1024)
def _prepared_backward(sizes: Sizes) -> Prepared:
    (F, D, E), constants = _constants(sizes)
    B, H, N, _ = sizes.queries
    best = plan_projected_backward(N, B * H, F, max(D, E), _plain(sizes))
    (gains, _, square), (warped, masked, _) = sizes.numbers, sizes.flags
    *inputs, output, upstream, dq, dv = sizes.strides
    strides = (*chain(*inputs), *output[:3], *upstream, *dq[:3], *dv[:3])
    options = []
    for plan in smaller(best):
        arguments = (
            *(_scaled(gains), LOG2E.value * square, sizes.draws[2], sizes.banks),
            *(*strides, H, N, B * H, plan.chunks, plan.readers),
            *(*constants, plan.block, plan.query_block, plan.unit, plan.tile, plan.stages, KINDS[sizes.kind]),
            *(warped, masked, plan.hold, "ieee"),
        )
        options.append(Option((B * H * (F // plan.unit * plan.chunks + 2 * plan.readers),), arguments, plan.warps))
    return Prepared(Launch(kernels.backward, options), best, B * H, F, E)


def _flags(x: Tensor, heads: int, units: int) -> Tensor | None:
    """Return lowered flags: three a head and one a unit."""
    return lowered(x, heads * -(-(3 + units) // 2))


def _statistics(state: Tensor, heads: int, F: int, E: int) -> View:
    """Return what a state has after its slots."""
    return View(state, (3, heads, F), (heads * F, F, 1), heads * F * E, torch.float32)


def launch_forward(
    inputs: Projection, sizes: Sizes, parts: Sequence[Memory], keep: Tensor | None, features: FeatureMap
) -> tuple[Tensor, Tensor]:
    """Return the output and the state: slots (B H, F, E), statistics (3, B H, F), and lse (B H, N) if it is saved."""
    launch, plan, heads, F, E = _prepared_forward(sizes)
    x, rows = inputs.x, sizes.queries[2] if sizes.flags[-1] else 0
    with on(x):
        o, sums, tips = output_for(inputs), None, None
        state = x.new_empty(heads * (F * (E + 3) + rows), dtype=torch.float32)
        if not plan.whole:
            pieces = heads * plan.chunks
            sums, tips = carve(x, (sizes.types[1], pieces * F * E), (torch.float32, 2 * pieces * F))
        launch(*parts, keep, features.draws, features.bank, features.shift, features.log_weights, o, state,
               _statistics(state, heads, F, E), sums, tips, _flags(x, heads, F // plan.unit))  # fmt: skip
    return o, state


def launch_backward(
    inputs: Projection,
    sizes: Sizes,
    parts: Sequence[Memory],
    keep: Tensor | None,
    features: FeatureMap,
    others: Sequence[Memory],
    state: Tensor,
) -> Tensor | None:
    """Write the gradients of queries, keys and values; return that of the shift, (H, D, D), if there is one.

    Args:
        inputs: as they came.
        sizes: of the call.
        parts: queries, keys and values.
        keep: key mask.
        features: the map.
        others: the output and its gradient, and memory for the gradients of queries, keys and values.
        state: what the forward pass returned.
    """
    launch, plan, heads, F, E = _prepared_backward(sizes)
    x, (_, H, N, D), dwarp = inputs.x, sizes.queries, None
    with on(x):
        sums, lifts, dslots = carve(
            x,
            (torch.float32, heads * plan.chunks * F * E),
            (torch.float32, heads * ((plan.chunks + 2) * F + N)),
            (sizes.types[1], heads * F * E),
        )
        if features.shift is not None:
            dwarp = x.new_empty(2 * plan.readers * heads, D, D, dtype=torch.float32)
        launch(*parts, keep, features.draws, features.bank, features.shift, *others, dwarp, state,
               _statistics(state, heads, F, E), sums, lifts, dslots, _flags(x, heads, F // plan.unit))  # fmt: skip
        return None if dwarp is None else dwarp.view(-1, H, D, D).sum(0)
