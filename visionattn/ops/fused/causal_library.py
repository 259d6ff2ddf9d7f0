"""Causal attention by positive features: the kernels' launches, and their gradients of any order.

The paths are those of :mod:`visionattn.ops.fused.library`: at once in eager mode, by operators elsewhere.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn.ops import positive, scan
from visionattn.ops.fused import causal as kernels
from visionattn.ops.fused import causal_gradients
from visionattn.ops.fused.buffers import eager_gradients, gradients_for, output_for, padded
from visionattn.ops.fused.launch import Launch, Option, aligned, on, plain
from visionattn.ops.fused.library import KINDS
from visionattn.ops.fused.maps import FeatureMap
from visionattn.ops.fused.operators import operator
from visionattn.ops.fused.tiles import NEVER
from visionattn.ops.packing import Projection
from visionattn.ops.precision import outcast

Saved = tuple[Tensor, Tensor, Tensor, Tensor]
"""What gradients need: mixed values less the origin, statistics of queries, marks, and states of keys before chunks."""


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, features: FeatureMap | Callable[[Tensor], Tensor], keep: Tensor | None = None
) -> Tensor:
    """Attend from each token to itself and those before it by fused kernels, in O(N F E) time.

    Args:
        q: (B, H, N, D), of any strides; as k and v, in float16, bfloat16 or float32.
        k: (B, H, N, D).
        v: (B, H, N, E).
        features: a map, which is computed on chip if it is taken entry by entry; or what returns the logarithms of
            features, (B, H, N, F), of queries or keys. These, and those of other maps, lie in memory.
        keep: key mask, boolean, broadcastable to (B, H, N, 1). A query without any key gets zeros.

    Returns:
        (B, H, N, E), in memory as (B, N, H, E).
    """
    kind = "exp"
    if isinstance(features, FeatureMap) and features.draws is None and (keep is None or features.kind != "relu"):
        kind = features.kind  # relu gives no number a feature of zero, which a key that is masked shall have
    elif isinstance(features, FeatureMap):
        q, k = features.logs(q), features.key_logs(k)
    else:
        q, k = features(q), features(k)
    if keep is not None:
        k, v = outcast(k, keep, float("-inf")), outcast(v, keep)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not plain(_together(q, k, v)):
        o: Tensor = _forward(q, k, v, kind, save)[0]
        return o
    if save:
        return _Attend.apply(q, k, v, kind)
    return _launch_forward(q, k, v, kind, False)[0]


class Sizes(NamedTuple):
    """What a launch needs to know of its inputs, and what it is remembered by.

    Attributes:
        queries: shape of the queries, or of the logarithms of their features, (B, H, N, F).
        width: of the values, E.
        strides: of all inputs in order.
        types: theirs, and the device's number, None for the CPU.
        bits: which tensors begin at a multiple of 16 bytes.
        kind: of the map.
        save: whether gradients shall be taken.
    """

    queries: tuple[int, ...]
    width: int
    strides: tuple[tuple[int, ...], ...]
    types: tuple[Any, ...]
    bits: int
    kind: str
    save: bool


class Plan(NamedTuple):
    """How the kernels are launched, a function of shapes and types alone, so that sums have one order on all machines.

    Attributes:
        chunks: parts of a head, each of which one program goes through.
        block: tokens at a time, C.
        feature_tile: features of one program where one needs not all of them.
        value_tile: values likewise.
        limit: what the maximum of logarithms may grow by within a block, in nats; less for float32, since weights are
            rounded in proportion to it.
        warps: of a program.
        gradient_warps: of one that takes gradients.
        stages: blocks of which loads are under way at a time where states are made.
    """

    chunks: int
    block: int
    feature_tile: int
    value_tile: int
    limit: float
    warps: int
    gradient_warps: int
    stages: int


def plan(tokens: int, heads: int, features: int, values: int, half: bool) -> Plan:
    """Choose for N tokens, B H heads, padded numbers of features and values, and half or full precision of values."""
    narrow = max(features, values) <= 64
    return Plan(
        chunks=max(1, min(tokens // 256, 64, 792 // heads)),
        block=(64 if narrow else 32) if half else 16,
        feature_tile=min(features, 64, max(16, 4096 // values)),
        value_tile=min(values, max(16, (8192 if half else 4096) // features)),
        limit=40.0 if half else 8.0,
        warps=4 if narrow and half else 8,
        gradient_warps=4 if narrow and half else 8,
        stages=2,
    )


class Prepared(NamedTuple):
    """The launches of one direction: what makes states of chunks, joins them, and reads them; and their plan."""

    gather: Launch
    join: Launch
    read: Launch
    plan: Plan


def _sizes(q: Tensor, k: Tensor, v: Tensor, kind: str, save: bool, *others: Tensor) -> Sizes:
    """Return the sizes of a call; ``others`` are further tensors of any strides."""
    return Sizes(
        q.shape,
        v.shape[-1],
        (q.stride(), k.stride(), v.stride(), *(x.stride() for x in others)),
        (q.dtype, v.dtype, q.device.index),
        aligned(q, k, v, *others),
        kind,
        save,
    )


def _planned(sizes: Sizes) -> tuple[Plan, int, int]:
    """Return the plan, and the padded numbers of features and values."""
    (B, H, N, _), F, E = sizes.queries, padded(sizes.queries[-1]), padded(sizes.width)
    return plan(N, B * H, F, E, sizes.types[1] != torch.float32), F, E


def _precision(sizes: Sizes) -> str:
    """Return how numbers are multiplied, see :func:`visionattn.ops.fused.causal.product`."""
    if sizes.types[1] == torch.float32:
        return "ieee"
    return "emulated" if sizes.types[2] is None else "split"


@lru_cache(maxsize=1024)
def _prepared_forward(sizes: Sizes) -> Prepared:
    (best, F, E), (B, H, N, width) = _planned(sizes), sizes.queries
    chunks, block, P = best.chunks, best.block, _precision(sizes)
    queries, keys, values = sizes.strides
    head, output = (KINDS[sizes.kind], width, sizes.width), (N * H * sizes.width, sizes.width, H * sizes.width)
    tile = best.feature_tile
    arguments = (*keys, *values, H, N, chunks - 1, *head, F, tile, E, block, P)
    gather = [Option((B * H * (chunks - 1), F // tile), (*arguments, s), best.warps) for s in range(best.stages, 0, -1)]
    arguments = (*queries, *keys, *values, *output, B * H * N, H, N, chunks)
    arguments = (*arguments, *head, F, E, best.value_tile, block, sizes.save, P, best.limit)
    read = Option((B * H * chunks, E // best.value_tile), arguments, best.warps)
    join = Option((B * H, F // 16), (chunks - 1, F, 16, E), 4)
    return Prepared(Launch(kernels.gather, gather), Launch(kernels.join, [join]), Launch(kernels.forward, [read]), best)


@lru_cache(maxsize=1024)
def _prepared_backward(sizes: Sizes) -> tuple[Launch, Prepared]:
    """Return the launch for queries, then those for keys and values."""
    (best, F, E), (B, H, N, width) = _planned(sizes), sizes.queries
    chunks, tile, warps = best.chunks, best.feature_tile, best.gradient_warps
    queries, keys, values, upstream, dq, dk, dv = sizes.strides
    constants = (KINDS[sizes.kind], width, sizes.width, F, tile, E, best.block, _precision(sizes))
    tokens = (B * H * N, H, N, chunks)
    grid, inputs = (B * H * chunks, F // tile), (*queries, *keys, *values, *upstream)
    of_queries = Option(grid, (*inputs, *dq[:3], *tokens, *constants), warps)
    arguments = (*queries, *keys, *upstream, B * H * N, H, N, chunks - 1, *constants)
    gather = Option((B * H * (chunks - 1), F // tile), arguments, best.warps)
    size = N * H * sizes.width
    parts = (0, *dv[:3]) if tile == F else (B * size, size, sizes.width, H * sizes.width)
    read = Option(grid, (*inputs, *dk[:3], *parts, *tokens, *constants), warps)
    arguments = (chunks - 1, N, F, 16, sizes.width, E, best.block, _precision(sizes))
    join = Option((B * H, F // 16), arguments, 4)
    return Launch(causal_gradients.query_gradients, [of_queries]), Prepared(
        Launch(causal_gradients.gather_queries, [gather]),
        Launch(causal_gradients.join_queries, [join]),
        Launch(causal_gradients.key_gradients, [read]),
        best,
    )


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, kind: str, save: bool) -> tuple[Tensor, Saved | None]:
    """Return the output and, if it is saved, what gradients need."""
    sizes = _sizes(q, k, v, kind, save)
    gather, join, read, best = _prepared_forward(sizes)
    with on(q):
        o, saved = output_for(_together(q, k, v)), _saved(q, v, best) if save else None
        states = _states(q, v, best) if saved is None else saved[3]
        if best.chunks > 1:
            own = torch.empty_like(states)
            gather(k, v, own)
            join(own, states)
        mixes, stats, marks, _ = (None,) * 4 if saved is None else saved
        read(q, k, v, o, mixes, stats, marks, states)
    return o, saved


def _launch_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, saved: Saved, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    dq, dk, dv = gradients_for(_together(q, k, v)).parts()
    sizes = _sizes(q, k, v, kind, True, do, dq, dk, dv)
    of_queries, (gather, join, of_keys, best) = _prepared_backward(sizes)
    mixes, stats, marks, states = saved
    B, H, N, E = v.shape
    with on(q):
        deltas, joined = v.new_empty(B, H, N, dtype=torch.float32), torch.empty_like(states)
        of_queries(q, k, v, do, dq, mixes, stats, deltas, states)
        if best.chunks > 1:
            own = torch.empty_like(states)
            gather(q, k, do, mixes, stats, deltas, marks, own)
            join(own, joined, mixes)
        tiles = padded(q.shape[-1]) // best.feature_tile
        parts = dv if tiles == 1 else v.new_empty(tiles, B, N, H, E, dtype=torch.float32)
        of_keys(q, k, v, do, dk, parts, mixes, stats, deltas, marks, joined)
        if tiles > 1:
            dv.copy_(parts.sum(0).transpose(1, 2))
    return dq, dk, dv


def _saved(q: Tensor, v: Tensor, best: Plan) -> Saved:
    """Return memory for what gradients need."""
    B, H, N, E = v.shape
    return (
        v.new_empty(B, H, N, E, dtype=torch.float32),
        v.new_empty(3, B, H, N, dtype=torch.float32),
        v.new_empty(B, H, -(-N // best.block), padded(q.shape[-1]), dtype=torch.float32),
        _states(q, v, best),
    )


def _together(q: Tensor, k: Tensor, v: Tensor) -> Projection:
    return Projection(q, q.shape[1], k, v)


def _nothing(v: Tensor) -> Saved:
    """Return what an operator returns in place of what is not saved."""
    one, two, three, four = (v.new_empty(0, dtype=torch.float32) for _ in range(4))
    return one, two, three, four


def _states(q: Tensor, v: Tensor, best: Plan) -> Tensor:
    """Return memory for the states of all chunks but one."""
    size = padded(q.shape[-1]) * (padded(v.shape[-1]) + 2)
    return v.new_empty(*v.shape[:2], best.chunks - 1, size, dtype=torch.float32)


class _Attend(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
        o, saved = _launch_forward(q, k, v, kind, True)
        assert saved is not None
        ctx.save_for_backward(q, k, v, *saved)
        ctx.kind = kind
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v, *saved = ctx.saved_tensors
        return *_gradients(q, k, v, do, saved, ctx.kind), None


def _gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor, saved: Any, kind: str) -> tuple[Tensor | None, ...]:
    """Return the gradients of queries, keys and values."""
    if torch.is_grad_enabled():  # create_graph=True: the gradient shall have a gradient
        return tuple(_eager_gradients(q, k, v, do, kind))
    if plain(_together(q, k, v), do):
        return _launch_backward(q, k, v, do, saved, kind)
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(q, k, v, do, *saved, kind)
    return gradients


def _eager_gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor, kind: str) -> list[Tensor | None]:
    """Differentiate the eager formula, differentiably."""
    logs = FeatureMap(kind).logs

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scan.causal(positive, logs(q), logs(k).clamp(min=NEVER.value), v)

    return eager_gradients(formula, _together(q, k, v), do)


def _operate(q: Tensor, k: Tensor, v: Tensor, kind: str, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o, saved = _launch_forward(q, k, v, kind, save)
    return (o, *_nothing(v)) if saved is None else (o, *saved)


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, kind: str, save: bool) -> Any:
    if not save:
        return output_for(_together(q, k, v)), *_nothing(v)
    (B, H, N, E), F = v.shape, padded(q.shape[-1])
    return output_for(_together(q, k, v)), *_saved(q, v, plan(N, B * H, F, padded(E), v.dtype != torch.float32))


def _operate_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, mixes: Tensor, stats: Tensor, marks: Tensor, states: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_backward(q, k, v, do, (mixes, stats, marks, states), kind)


def _backward_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return gradients_for(_together(q, k, v)).parts()


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.kind, _ = inputs
    ctx.save_for_backward(q, k, v, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 5
    q, k, v, *saved = ctx.saved_tensors
    return *_gradients(q, k, v, do, saved, ctx.kind), None, None


_forward = operator(
    "causal(Tensor q, Tensor k, Tensor v, str kind, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _operate,
    _forward_shapes,
    _differentiate,
    _remember,
)
_backward = operator(
    "causal_backward(Tensor q, Tensor k, Tensor v, Tensor do, Tensor mixes, Tensor stats, Tensor marks, Tensor states, "
    "str kind) -> (Tensor, Tensor, Tensor)",
    _operate_backward,
    _backward_shapes,
)
