"""Launches of the kernels of projected feature maps."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from visionattn.ops.fused import projected as kernels
from visionattn.ops.fused.buffers import padded
from visionattn.ops.fused.launch import Launch, Option, lowered
from visionattn.ops.fused.plan import Plan, plan_projected, plan_projected_backward, smaller

if TYPE_CHECKING:
    from visionattn.ops.fused.library import Sizes
    from visionattn.ops.fused.maps import FeatureMap

KINDS = {"random": kernels.RANDOM.value, "sphere": kernels.SPHERE.value}

LOG2E = kernels.LOG2E.value


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
    return tuple(LOG2E * x for x in values)


@lru_cache(maxsize=1024)
def _prepared_forward(sizes: Sizes) -> Prepared:
    (F, D, E), constants = _constants(sizes)
    B, H, N, _ = sizes.queries
    best = plan_projected(N, B * H, F, max(D, E))
    (gains, priors, square), (warped, masked, save) = sizes.numbers, sizes.flags
    strides = (*chain(*sizes.strides), N * H * sizes.width, sizes.width, H * sizes.width)
    options = []
    for plan in smaller(best):
        arguments = (
            *(_scaled(gains), _scaled(priors), LOG2E * square, sizes.draws[2], sizes.banks),
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
    best = plan_projected_backward(N, B * H, F, max(D, E))
    (gains, _, square), (warped, masked, _) = sizes.numbers, sizes.flags
    *inputs, output, upstream, dq, dv = sizes.strides
    strides = (*chain(*inputs), *output[:3], *upstream, *dq[:3], *dv[:3])
    options = []
    for plan in smaller(best):
        arguments = (
            *(_scaled(gains), LOG2E * square, sizes.draws[2], sizes.banks),
            *(*strides, H, N, B * H, plan.chunks, plan.readers),
            *(*constants, plan.block, plan.query_block, plan.unit, plan.tile, plan.stages, KINDS[sizes.kind]),
            *(warped, masked, plan.hold, "ieee"),
        )
        options.append(Option((B * H * (F // plan.unit * plan.chunks + 2 * plan.readers),), arguments, plan.warps))
    return Prepared(Launch(kernels.backward, options), best, B * H, F, E)


def _flags(x: Tensor, heads: int, units: int) -> Tensor | None:
    """Return lowered flags: three a head and one a unit."""
    return lowered(x, heads * -(-(3 + units) // 2))


def launch_forward(
    sizes: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    features: FeatureMap,
    o: Tensor,
    slots: Tensor,
    stats: Tensor,
) -> None:
    """Write the output and the state: slots (B H, F, E), and statistics (3, B H, F) followed by lse (B H, N)."""
    launch, plan, heads, F, E = _prepared_forward(sizes)
    parts, tips = None, None
    if not plan.whole:
        parts = v.new_empty(heads * plan.chunks, F, E)
        tips = q.new_empty(2, heads * plan.chunks, F, dtype=torch.float32)
    _, draws, bank, shift, *_ = features
    launch(q, k, v, keep, draws, bank, shift, o, slots, stats, parts, tips, _flags(q, heads, F // plan.unit))


def launch_backward(
    sizes: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    features: FeatureMap,
    o: Tensor,
    do: Tensor,
    slots: Tensor,
    stats: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor | None:
    """Write the gradients of queries, keys and values; return that of the shift, (H, D, D), if there is one."""
    launch, plan, heads, F, E = _prepared_backward(sizes)
    _, H, N, D = sizes.queries
    parts = q.new_empty(heads * plan.chunks, F, E, dtype=torch.float32)
    lifts = q.new_empty(heads * ((plan.chunks + 2) * F + N), dtype=torch.float32)
    dslots, dwarp = v.new_empty(heads, F, E), None
    _, draws, bank, shift, *_ = features
    if shift is not None:
        dwarp = q.new_empty(2 * plan.readers * heads, D, D, dtype=torch.float32)
    launch(q, k, v, keep, draws, bank, shift, o, do, dq, dk, dv, dwarp, slots, stats, parts, lifts, dslots,
           _flags(q, heads, F // plan.unit))  # fmt: skip
    return None if dwarp is None else dwarp.view(-1, H, D, D).sum(0)
