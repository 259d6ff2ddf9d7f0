"""Attention by ELA's distance and direction: the kernels' launches, and their gradients of any order.

The paths are those of :mod:`visionattn.ops.fused.library`: at once in eager mode, by operators elsewhere.
"""

from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn.ops import distance, ela_direction, signed
from visionattn.ops.fused import moments as kernels
from visionattn.ops.fused.buffers import (
    Memory,
    by_heads,
    eager_gradients,
    gradients_for,
    mask_for,
    mask_strides,
    output_for,
    padded,
    parts_of,
    present,
)
from visionattn.ops.fused.launch import Launch, Option, aligned, lowered, on, plain
from visionattn.ops.fused.operators import operator
from visionattn.ops.fused.plan import Plan, plan_moments, plan_moments_backward, smaller
from visionattn.ops.packing import Projection

KINDS = {"sum": kernels.SUM.value, "diff": kernels.DIFF.value, "direction": kernels.DIRECTION.value}

HALF_PRECISION = "bf16x3"
"""How float32 numbers are multiplied where inputs and outputs are in half precision."""


def attend_moments(inputs: Projection, kind: str, keep: Tensor | None = None) -> Tensor:
    """Attend over all tokens by fused kernels.

    Args:
        inputs: queries, keys and values, of any strides, in float16, bfloat16 or float32.
        kind: of the kernel: ``sum``, ``|q + k|^2``; ``diff``, ``|q - k|^2``; ``direction``, that of
            :mod:`visionattn.ops.ela_direction`.
        keep: key mask, broadcastable to (B, H, N, 1). A head without any key gets zeros.

    Returns:
        (B, H, N, E), in memory as (B, N, H, E); of packed inputs, (B, N, H E).
    """
    x, heads, k, v = inputs
    keep = mask_for(keep, inputs)
    save = torch.is_grad_enabled() and any(i is not None and i.requires_grad for i in (x, k, v))
    if not plain(inputs):
        o: Tensor = _forward(x, k, v, heads, keep, kind, save)[0]
        return o
    if save:
        return _Attend.apply(x, k, v, heads, keep, kind)
    return _launch_forward(inputs, keep, kind, False)[0]


class Sizes(NamedTuple):
    """What a launch needs to know of its inputs, and what it is remembered by.

    Attributes:
        queries: shape of the queries, (B, H, N, D).
        width: of the values, E.
        strides: of all inputs in order.
        types: theirs, and the device's number, None for the CPU.
        bits: which tensors begin at a multiple of 16 bytes.
        kind: of the kernel.
        flags: whether there is a mask, and whether the state is saved.
    """

    queries: tuple[int, ...]
    width: int
    strides: tuple[tuple[int, ...], ...]
    types: tuple[Any, ...]
    bits: int
    kind: str
    flags: tuple[bool, ...]


def _sizes(
    inputs: Projection, keep: Tensor | None, kind: str, save: bool, *others: Memory
) -> tuple[Sizes, tuple[Memory, Memory, Memory]]:
    """Return the sizes of a call, and queries, keys and values; ``others`` is further memory of any strides."""
    q, k, v = parts = parts_of(inputs)
    return Sizes(
        q.shape,
        v.shape[-1],
        (q.stride(), k.stride(), v.stride(), mask_strides(keep), *[x.stride() for x in others]),
        (q.dtype, v.dtype, inputs.x.device.index),
        aligned(q, k, v, keep, *others),
        kind,
        (keep is not None, save),
    ), parts


def _precision(sizes: Sizes) -> str:
    return HALF_PRECISION if sizes.types[0] != torch.float32 and sizes.types[2] is not None else "ieee"


@lru_cache(maxsize=1024)
def _prepared_forward(sizes: Sizes) -> tuple[Launch, Plan]:
    B, H, N, width = sizes.queries
    D, E = padded(width), padded(sizes.width)
    half = sizes.types[0] != torch.float32
    best = plan_moments(N, B * H, max(D, E), half)
    strides = (*chain(*sizes.strides), N * H * sizes.width, sizes.width, H * sizes.width)
    sample = 32 if half else 256  # rounding in float32 is seen the more, the farther the origins are off
    masked, save = sizes.flags
    options = []
    for plan in smaller(best):
        arguments = (
            *(*strides, H, N, B * H * plan.chunks, plan.chunks, plan.readers),
            *(width, sizes.width, D, E, plan.block, plan.query_block, sample, plan.stages, KINDS[sizes.kind]),
            *(masked, plan.whole, save, _precision(sizes)),
        )
        options.append(Option(plan.grid(B * H), arguments, plan.warps))
    return Launch(kernels.forward, options), best


@lru_cache(maxsize=1024)
def _prepared_backward(sizes: Sizes) -> tuple[Launch, Plan]:
    B, H, N, width = sizes.queries
    D, E = padded(width), padded(sizes.width)
    best = plan_moments_backward(N, B * H, max(D, E))
    *inputs, upstream, dq, dv = sizes.strides
    strides = (*chain(*inputs), *upstream, *dq[:3], *dv[:3])
    masked, _ = sizes.flags
    options = []
    for plan in smaller(best):
        arguments = (
            *(*strides, H, N, B * H * plan.chunks, plan.chunks, plan.readers),
            *(width, sizes.width, D, E, plan.block, plan.stages, KINDS[sizes.kind]),
            *(masked, plan.whole, _precision(sizes)),
        )
        options.append(Option(plan.grid(B * H), arguments, plan.warps))
    return Launch(kernels.backward, options), best


def _launch_forward(inputs: Projection, keep: Tensor | None, kind: str, save: bool) -> tuple[Tensor, Tensor | None]:
    """Return the output and, if it is saved, the state of all heads."""
    sizes, (q, k, v) = _sizes(inputs, keep, kind, save)
    launch, plan = _prepared_forward(sizes)
    x, heads = inputs.x, sizes.queries[0] * sizes.queries[1]
    with on(x):
        o, state, parts, flags = output_for(inputs), None, None, None
        if save or not plan.whole:
            state = _states(x, sizes.queries[-1], sizes.width, heads)
        if not plan.whole:
            parts, flags = _states(x, sizes.queries[-1], sizes.width, heads * plan.chunks), lowered(x, heads)
        launch(q, k, v, keep, o, state, parts, flags)
    return o, state


def _launch_backward(inputs: Projection, keep: Tensor | None, kind: str, do: Tensor, state: Tensor) -> Projection:
    """Return the gradients of the inputs."""
    gradients = gradients_for(inputs)
    dq, dk, dv = parts_of(gradients)
    upstream = by_heads(do, inputs)
    sizes, (q, k, v) = _sizes(inputs, keep, kind, True, upstream, dq, dv)
    launch, plan = _prepared_backward(sizes)
    x, heads = inputs.x, sizes.queries[0] * sizes.queries[1]
    with on(x):
        dstate, parts, flags = None, None, None
        if not plan.whole:
            dstate, flags = torch.empty_like(state), lowered(x, heads)
            parts = _states(x, sizes.queries[-1], sizes.width, heads * plan.chunks)
        launch(q, k, v, keep, upstream, dq, dk, dv, state, dstate, parts, flags)
    return gradients


class _Attend(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, k: Tensor | None, v: Tensor | None, heads: int, keep: Tensor | None, kind: str
    ) -> Tensor:
        o, state = _launch_forward(Projection(x, heads, k, v), keep, kind, True)
        ctx.save_for_backward(x, k, v, keep, state)
        ctx.heads, ctx.kind = heads, kind
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        x, k, v, keep, state = ctx.saved_tensors
        return *_gradients(Projection(x, ctx.heads, k, v), keep, ctx.kind, do, state), None, None, None


def _gradients(
    inputs: Projection, keep: Tensor | None, kind: str, do: Tensor, state: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs."""
    if torch.is_grad_enabled():  # create_graph=True: the gradient shall have a gradient
        return tuple(_eager_gradients(inputs, keep, kind, do))
    x, heads, k, v = inputs
    if plain(inputs, do):
        dx, _, dk, dv = _launch_backward(inputs, keep, kind, do, state)
    else:
        dx, dk, dv = _backward(x, k, v, heads, keep, kind, do, state)
    return dx, *((None, None) if k is None else (dk, dv))


def _eager_gradients(inputs: Projection, keep: Tensor | None, kind: str, do: Tensor) -> list[Tensor | None]:
    """Differentiate the eager formula, differentiably."""
    mask = None if keep is None else keep.unsqueeze(-1).bool()

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind == "direction":
            return signed.linear(ela_direction.query_features(q), ela_direction.key_features(k), v, mask)
        return distance.linear(q, -k if kind == "diff" else k, v, mask)

    return eager_gradients(formula, inputs, do)


def _states(x: Tensor, width: int, value_width: int, count: int) -> Tensor:
    """Return memory for states, each of them a row, of heads and values of some widths."""
    D, E = padded(width), padded(value_width)
    return x.new_empty(count, D * E + D + 2 * E + 16, dtype=torch.float32)


def _operate(
    x: Tensor, k: Tensor | None, v: Tensor | None, heads: int, keep: Tensor | None, kind: str, save: bool
) -> tuple[Tensor, Tensor]:
    o, state = _launch_forward(Projection(x, heads, k, v), keep, kind, save)
    return o, state if save and state is not None else x.new_empty(0, dtype=torch.float32)


def _forward_shapes(
    x: Tensor, k: Tensor | None, v: Tensor | None, heads: int, keep: Any, kind: str, save: bool
) -> tuple[Tensor, Tensor]:
    inputs = Projection(x, heads, k, v)
    (B, H, _, D), _, (*_, E) = inputs.shapes()
    return output_for(inputs), _states(x, D, E, B * H) if save else x.new_empty(0, dtype=torch.float32)


def _operate_backward(
    x: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    heads: int,
    keep: Tensor | None,
    kind: str,
    do: Tensor,
    state: Tensor,
) -> tuple[Tensor, ...]:
    dx, _, dk, dv = _launch_backward(Projection(x, heads, k, v), keep, kind, do, state)
    return present(x, dx, dk, dv)


def _backward_shapes(x: Tensor, k: Tensor | None, v: Tensor | None, heads: int, *rest: Any) -> tuple[Tensor, ...]:
    dx, _, dk, dv = gradients_for(Projection(x, heads, k, v))
    return present(x, dx, dk, dv)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, k, v, ctx.heads, keep, ctx.kind, _ = inputs
    ctx.save_for_backward(x, k, v, keep, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, _: Any) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 7
    x, k, v, keep, state = ctx.saved_tensors
    return *_gradients(Projection(x, ctx.heads, k, v), keep, ctx.kind, do, state), None, None, None, None


INPUTS = "Tensor x, Tensor? k, Tensor? v, int heads, Tensor? keep, str kind"

_forward = operator(
    f"moments({INPUTS}, bool save) -> (Tensor, Tensor)", _operate, _forward_shapes, _differentiate, _remember
)
_backward = operator(
    f"moments_backward({INPUTS}, Tensor do, Tensor state) -> (Tensor, Tensor, Tensor)",
    _operate_backward,
    _backward_shapes,
)
