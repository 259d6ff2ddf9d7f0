"""Attention by positive features: the kernels' launches, and their gradients of any order.

In eager mode an autograd function launches at once. Under ``torch.compile``, and wherever something else than plain
tensors is at work, the same launches are operators of PyTorch.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn.ops import positive
from visionattn.ops.fused import positive as kernels
from visionattn.ops.fused import projected_library
from visionattn.ops.fused.buffers import (
    differentiable_gradients,
    full_precision,
    gradients_like,
    mask_for,
    mask_strides,
    output_like,
    padded,
)
from visionattn.ops.fused.launch import Launch, Option, aligned, lowered, on, plain
from visionattn.ops.fused.maps import FeatureMap
from visionattn.ops.fused.plan import Plan, plan_backward, plan_forward, smaller

KINDS = {
    "exp": kernels.EXP.value,
    "elu": kernels.ELU.value,
    "relu": kernels.RELU.value,
}

HELD = 64
"""Width up to which programs with projections hold a warp, and values, at a time."""


def attend(q: Tensor, k: Tensor, v: Tensor, features: FeatureMap, keep: Tensor | None = None) -> Tensor:
    """Attend over all tokens by fused kernels.

    Args:
        q: (B, H, N, D), of any strides; as k and v, in float16, bfloat16 or float32.
        k: (B, H, N, D).
        v: (B, H, N, E).
        features: the map of queries and keys.
        keep: key mask, broadcastable to (B, H, N, 1). A head without any key gets zeros.

    Returns:
        (B, H, N, E), in memory as (B, N, H, E).
    """
    if features.draws is not None and features.shift is not None and q.shape[-1] > HELD:
        q, k, features = features.warped(q), features.warped(k), features._replace(shift=None)
    if features.draws is not None and v.shape[-1] > HELD:
        parts = [attend(q, k, part, features, keep).transpose(1, 2) for part in torch.split(v, HELD, -1)]
        return torch.cat(parts, -1).transpose(1, 2)
    shift, keep = features.shift, mask_for(keep, q)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, shift))
    if not plain(q, k, v, shift):
        return _forward(q, k, v, keep, *features, save)[0]
    if save:
        return _Attend.apply(q, k, v, shift, keep, features)
    return _launch_forward(q, k, v, keep, features, False)[0]


class Sizes(NamedTuple):
    """What a launch needs to know of its inputs, and what it is remembered by.

    Attributes:
        queries: shape of the queries, (B, H, N, D).
        width: of the values, E.
        strides: of all inputs in order.
        types: theirs, and the device's number.
        bits: which tensors begin at a multiple of 16 bytes.
        kind: of the map.
        draws: shape of its draws, (R, H, M, D), or nothing.
        banks: number of its anchors.
        numbers: gains, priors and square.
        flags: whether there is a warp and a mask, and whether the state is saved.
    """

    queries: tuple[int, ...]
    width: int
    strides: tuple[tuple[int, ...], ...]
    types: tuple[Any, ...]
    bits: int
    kind: str
    draws: tuple[int, ...]
    banks: int
    numbers: tuple[Any, ...]
    flags: tuple[bool, ...]


class Prepared(NamedTuple):
    """A launch with the sizes of the memory that it needs: those of its plan, and the padded F and E."""

    launch: Launch
    plan: Plan
    features: int
    values: int


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, features: FeatureMap, save: bool, *others: Tensor
) -> Sizes:
    """Return the sizes of a call; ``others`` are further tensors of any strides."""
    kind, draws, bank, shift, gains, priors, square = features
    return Sizes(
        q.shape,
        v.shape[-1],
        (q.stride(), k.stride(), v.stride(), mask_strides(keep), *(x.stride() for x in others)),
        (q.dtype, v.dtype, q.device.index, *(None if x is None else x.dtype for x in (draws, bank, shift))),
        aligned(q, k, v, draws, bank, shift, *others),
        kind,
        () if draws is None else draws.shape,
        1 if bank is None else len(bank),
        (tuple(gains), tuple(priors), square),
        (shift is not None, keep is not None, save),
    )


def _padded(features: FeatureMap, q: Tensor, v: Tensor) -> tuple[int, int, int]:
    """Return F, D and E as kernels have them: powers of two from 16 on."""
    return padded(features.features(q.shape[-1])), padded(q.shape[-1]), padded(v.shape[-1])


def _constants(sizes: Sizes) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Return the padded D, that of features too, and E, and the constants of compilation that both kernels have."""
    D = sizes.queries[-1]
    F, E = padded(D), padded(sizes.width)
    return (F, E), (D, D, sizes.width, F, F, E)


@lru_cache(maxsize=1024)
def _prepared_forward(sizes: Sizes) -> Prepared:
    (F, E), constants = _constants(sizes)
    B, H, N, _ = sizes.queries
    best = plan_forward(N, B * H, F, max(F, E), sizes.types[0] != torch.float32)
    _, masked, save = sizes.flags
    strides = (*chain(*sizes.strides), N * H * sizes.width, sizes.width, H * sizes.width)
    options = []
    for plan in smaller(best):
        arguments = (
            *(*strides, H, N, B * H * plan.chunks, plan.chunks, plan.readers),
            *(*constants, plan.block, plan.query_block, plan.stages, KINDS[sizes.kind]),
            *(masked, plan.whole, save, "ieee"),
        )
        options.append(Option(plan.grid(B * H), arguments, plan.warps))
    return Prepared(Launch(kernels.forward, options), best, F, E)


@lru_cache(maxsize=1024)
def _prepared_backward(sizes: Sizes) -> Prepared:
    (F, E), constants = _constants(sizes)
    B, H, N, _ = sizes.queries
    best = plan_backward(N, B * H, F, max(F, E), sizes.types[0] != torch.float32)
    _, masked, _ = sizes.flags
    *inputs, upstream, dq, dv = sizes.strides
    strides = (*chain(*inputs), *upstream, *dq[:3], *dv[:3])
    options = []
    for plan in smaller(best):
        arguments = (
            *(*strides, H, N, B * H * plan.chunks, plan.chunks, plan.readers),
            *(*constants, plan.block, plan.stages, KINDS[sizes.kind], masked, plan.whole, "ieee"),
        )
        options.append(Option(plan.grid(B * H), arguments, plan.warps))
    return Prepared(Launch(kernels.backward, options), best, F, E)


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, features: FeatureMap, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the output and, if they are saved, the slots (B H, F, E) and the statistics of all heads."""
    sizes, heads = _sizes(q, k, v, keep, features, save), q.shape[0] * q.shape[1]
    with on(q):
        o, slots, stats, parts, tips = output_like(v), None, None, None, None
        if features.draws is not None:
            slots, stats = _state(q, v, features, save)
            projected_library.launch_forward(sizes, q, k, v, keep, features, o, slots, stats)
            return o, slots, stats
        launch, plan, F, E = _prepared_forward(sizes)
        if save or not plan.whole:
            slots, stats = _state(q, v, features, save)
        if not plan.whole:
            parts = v.new_empty(heads * plan.chunks, F, E)
            tips = q.new_empty(2, heads * plan.chunks, F, dtype=torch.float32)
        launch(q, k, v, keep, o, slots, stats, parts, tips, lowered(q, 0 if plan.whole else heads))
    return o, slots, stats


def _state(q: Tensor, v: Tensor, features: FeatureMap, save: bool) -> tuple[Tensor, Tensor]:
    """Return memory for slots, in float32 if gradients are taken from them, and for statistics, 3 B H F.

    Gradients of projected maps need a number a query besides.
    """
    B, H, N, _ = q.shape
    F, _, E = _padded(features, q, v)
    slots = v.new_empty(B * H, F, E, dtype=torch.float32 if save else v.dtype)
    rows = N if save and features.draws is not None else 0
    return slots, q.new_empty(B * H * (3 * F + rows), dtype=torch.float32)


def _launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    features: FeatureMap,
    o: Tensor | None,
    do: Tensor,
    slots: Tensor,
    stats: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor | None:
    """Write the gradients of queries, keys and values; return that of the shift, (H, D, D), if there is one."""
    with on(q):
        if o is not None:
            sizes = _sizes(q, k, v, keep, features, True, o, do, dq, dv)
            return projected_library.launch_backward(
                sizes, q, k, v, keep, features, o, do, slots, stats, dq, dk, dv)  # fmt: skip
        launch, plan, F, E = _prepared_backward(_sizes(q, k, v, keep, features, True, do, dq, dv))
        parts, lifts, dslots, heads = None, None, None, q.shape[0] * q.shape[1]
        if not plan.whole:
            parts = q.new_empty(heads * plan.chunks, E, F, dtype=torch.float32)
            lifts = q.new_empty(heads * ((plan.chunks + 1) * F + 1), dtype=torch.float32)
            dslots = v.new_empty(heads, F, E)
        flags = lowered(q, 0 if plan.whole else heads)
        launch(q, k, v, keep, do, dq, dk, dv, slots, stats, parts, lifts, dslots, flags)
        return None


class _Attend(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, shift: Tensor | None, keep: Tensor | None, features: FeatureMap
    ) -> Tensor:
        o, slots, stats = _launch_forward(q, k, v, keep, features, True)
        ctx.save_for_backward(q, k, v, shift, keep, features.draws, features.bank, _needed(o, features), slots, stats)
        ctx.features = features._replace(draws=None, bank=None, shift=None)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v, shift, keep, draws, bank, o, slots, stats = ctx.saved_tensors
        features = ctx.features._replace(draws=draws, bank=bank, shift=shift)
        return *_gradients(q, k, v, keep, features, o, do, slots, stats), None, None


def _needed(o: Tensor, features: FeatureMap) -> Tensor | None:
    """Return the output if gradients need it: those of projected maps do."""
    return None if features.draws is None else o


@full_precision
def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    features: FeatureMap,
    o: Tensor | None,
    do: Tensor,
    slots: Tensor,
    stats: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of queries, keys, values and shift."""
    if torch.is_grad_enabled():  # create_graph=True: the gradient shall have a gradient
        return tuple(_eager_gradients(q, k, v, keep, do, features))
    dq, dk, dv = gradients_like(q, k, v)
    if plain(q, k, v, do):
        dshift = _launch_backward(q, k, v, keep, features, o, do, slots, stats, dq, dk, dv)
    else:
        dshift = _backward(q, k, v, keep, o, do, slots, stats, *features, dq, dk, dv)
    return dq, dk, dv, None if features.shift is None or dshift is None else dshift.to(features.shift.dtype)


def _eager_gradients(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, do: Tensor, features: FeatureMap
) -> list[Tensor | None]:
    """Differentiate the eager formula, differentiably."""
    q, k, v = (x.view_as(x) for x in (q, k, v))  # one may depend on another
    inputs = [q, k, v, features.shift]
    mask = None if keep is None else keep.unsqueeze(-1).bool()
    return differentiable_gradients(positive.linear(features.logs(q), features.logs(k), v, mask), inputs, do)


@torch.library.custom_op("visionattn::positive", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    kind: str,
    draws: Tensor | None,
    bank: Tensor | None,
    shift: Tensor | None,
    gains: Sequence[float],
    priors: Sequence[float],
    square: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    features = FeatureMap(kind, draws, bank, shift, tuple(gains), tuple(priors), square)
    o, slots, stats = _launch_forward(q, k, v, keep, features, save)
    if save and slots is not None and stats is not None:
        return o, slots, stats
    return o, v.new_empty(0), q.new_empty(0)


@_forward.register_fake
def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, keep: Any, kind: str, draws: Any, bank: Any, shift: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if not rest[-1]:
        return output_like(v), v.new_empty(0), q.new_empty(0)
    return output_like(v), *_state(q, v, FeatureMap(kind, draws, bank), True)


@torch.library.custom_op("visionattn::positive_backward", mutates_args=("dq", "dk", "dv"))
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    o: Tensor | None,
    do: Tensor,
    slots: Tensor,
    stats: Tensor,
    kind: str,
    draws: Tensor | None,
    bank: Tensor | None,
    shift: Tensor | None,
    gains: Sequence[float],
    priors: Sequence[float],
    square: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    features = FeatureMap(kind, draws, bank, shift, tuple(gains), tuple(priors), square)
    dshift = _launch_backward(q, k, v, keep, features, o, do, slots, stats, dq, dk, dv)
    return stats.new_empty(0) if dshift is None else dshift


@_backward.register_fake
def _backward_shapes(*inputs: Any) -> Tensor:
    stats, shift = inputs[7], inputs[11]
    return stats.new_empty(0 if shift is None else shift.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, keep, ctx.kind, draws, bank, shift, ctx.gains, ctx.priors, ctx.square, _ = inputs
    o, *state = output
    ctx.save_for_backward(q, k, v, keep, draws, bank, shift, None if draws is None else o, *state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 12
    q, k, v, keep, draws, bank, shift, o, *state = ctx.saved_tensors
    features = FeatureMap(ctx.kind, draws, bank, shift, tuple(ctx.gains), tuple(ctx.priors), ctx.square)
    dq, dk, dv, dshift = _gradients(q, k, v, keep, features, o, do, *state)
    return dq, dk, dv, None, None, None, None, dshift, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_remember)
