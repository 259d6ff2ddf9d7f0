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
    differentiable_gradients,
    full_precision,
    gradients_like,
    mask_for,
    mask_strides,
    output_like,
    padded,
)
from visionattn.ops.fused.launch import Launch, Option, aligned, lowered, on, plain
from visionattn.ops.fused.plan import Plan, plan_moments, plan_moments_backward, smaller

KINDS = {"sum": kernels.SUM.value, "diff": kernels.DIFF.value, "direction": kernels.DIRECTION.value}

HALF_PRECISION = "bf16x3"
"""How float32 numbers are multiplied where inputs and outputs are in half precision."""


def attend_moments(q: Tensor, k: Tensor, v: Tensor, kind: str, keep: Tensor | None = None) -> Tensor:
    """Attend over all tokens by fused kernels.

    Args:
        q: (B, H, N, D), of any strides; as k and v, in float16, bfloat16 or float32.
        k: (B, H, N, D).
        v: (B, H, N, E).
        kind: of the kernel: ``sum``, ``|q + k|^2``; ``diff``, ``|q - k|^2``; ``direction``, that of
            :mod:`visionattn.ops.ela_direction`.
        keep: key mask, broadcastable to (B, H, N, 1). A head without any key gets zeros.

    Returns:
        (B, H, N, E), in memory as (B, N, H, E).
    """
    keep = mask_for(keep, q)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not plain(q, k, v):
        return _forward(q, k, v, keep, kind, save)[0]
    if save:
        return _Attend.apply(q, k, v, keep, kind)
    return _launch_forward(q, k, v, keep, kind, False)[0]


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


def _sizes(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, kind: str, save: bool, *others: Tensor) -> Sizes:
    """Return the sizes of a call; ``others`` are further tensors of any strides."""
    return Sizes(
        q.shape,
        v.shape[-1],
        (q.stride(), k.stride(), v.stride(), mask_strides(keep), *(x.stride() for x in others)),
        (q.dtype, v.dtype, q.device.index),
        aligned(q, k, v, *others),
        kind,
        (keep is not None, save),
    )


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


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, kind: str, save: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the output and, if it is saved, the state of all heads."""
    launch, plan = _prepared_forward(_sizes(q, k, v, keep, kind, save))
    heads = q.shape[0] * q.shape[1]
    with on(q):
        o, state, parts = output_like(v), None, None
        if save or not plan.whole:
            state = _states(q, v, heads)
        if not plan.whole:
            parts = _states(q, v, heads * plan.chunks)
        launch(q, k, v, keep, o, state, parts, lowered(q, 0 if plan.whole else heads))
    return o, state


def _launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    do: Tensor,
    state: Tensor,
    kind: str,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients of queries, keys and values."""
    launch, plan = _prepared_backward(_sizes(q, k, v, keep, kind, True, do, dq, dv))
    heads = q.shape[0] * q.shape[1]
    with on(q):
        dstate, parts = None, None
        if not plan.whole:
            dstate, parts = torch.empty_like(state), _states(q, v, heads * plan.chunks)
        flags = lowered(q, 0 if plan.whole else heads)
        launch(q, k, v, keep, do, dq, dk, dv, state, dstate, parts, flags)


class _Attend(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, kind: str) -> Tensor:
        o, state = _launch_forward(q, k, v, keep, kind, True)
        ctx.save_for_backward(q, k, v, keep, state)
        ctx.kind = kind
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v, keep, state = ctx.saved_tensors
        return *_gradients(q, k, v, keep, do, state, ctx.kind), None, None


@full_precision
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, do: Tensor, state: Tensor, kind: str
) -> tuple[Tensor | None, ...]:
    """Return the gradients of queries, keys and values."""
    if torch.is_grad_enabled():  # create_graph=True: the gradient shall have a gradient
        return tuple(_eager_gradients(q, k, v, keep, do, kind))
    dq, dk, dv = gradients_like(q, k, v)
    write = _launch_backward if plain(q, k, v, do) else _backward
    write(q, k, v, keep, do, state, kind, dq, dk, dv)
    return dq, dk, dv


def _eager_gradients(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, do: Tensor, kind: str
) -> list[Tensor | None]:
    """Differentiate the eager formula, differentiably."""
    inputs = q, k, v = [x.view_as(x) for x in (q, k, v)]  # one may depend on another
    mask = None if keep is None else keep.unsqueeze(-1).bool()
    if kind == "direction":
        o = signed.linear(ela_direction.query_features(q), ela_direction.key_features(k), v, mask)
    else:
        o = distance.linear(q, -k if kind == "diff" else k, v, mask)
    return differentiable_gradients(o, inputs, do)


@torch.library.custom_op("visionattn::moments", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, kind: str, save: bool) -> tuple[Tensor, Tensor]:
    o, state = _launch_forward(q, k, v, keep, kind, save)
    return o, state if save and state is not None else q.new_empty(0)


@_forward.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, keep: Any, kind: str, save: bool) -> tuple[Tensor, Tensor]:
    return output_like(v), _states(q, v, q.shape[0] * q.shape[1]) if save else q.new_empty(0)


@torch.library.custom_op("visionattn::moments_backward", mutates_args=("dq", "dk", "dv"))
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    do: Tensor,
    state: Tensor,
    kind: str,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    _launch_backward(q, k, v, keep, do, state, kind, dq, dk, dv)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, keep, ctx.kind, _ = inputs
    ctx.save_for_backward(q, k, v, keep, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, _: Any) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 6
    q, k, v, keep, state = ctx.saved_tensors
    return *_gradients(q, k, v, keep, do, state, ctx.kind), None, None, None


_forward.register_autograd(_differentiate, setup_context=_remember)


def _states(q: Tensor, v: Tensor, count: int) -> Tensor:
    """Return memory for states, each of them a row."""
    D, E = padded(q.shape[-1]), padded(v.shape[-1])
    return q.new_empty(count, D * E + D + 2 * E + 16, dtype=torch.float32)
