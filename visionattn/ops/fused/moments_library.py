"""The kernels of ELA's distance and direction as an operator of PyTorch, with gradients of any order."""

from typing import Any

import torch
from torch import Tensor

from visionattn.ops import distance, ela_direction, signed
from visionattn.ops.fused import moments as kernels
from visionattn.ops.fused.buffers import (
    differentiable_gradients,
    full_precision,
    gradients_like,
    on_device,
    output_like,
    padded,
)
from visionattn.ops.fused.plan import Plan, plan_moments, plan_moments_backward

KINDS = {"sum": kernels.SUM, "diff": kernels.DIFF, "direction": kernels.DIRECTION}

HALF_PRECISION = "bf16x3"
"""How float32 numbers are multiplied where inputs and outputs are in half precision."""


def attend_moments(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    """Attend over all tokens by fused kernels.

    Args:
        q: (B, H, N, D), of any strides; as k and v, in float16, bfloat16 or float32.
        k: (B, H, N, D).
        v: (B, H, N, E).
        kind: of the kernel: ``sum``, ``|q + k|^2``; ``diff``, ``|q - k|^2``; ``direction``, that of
            :mod:`visionattn.ops.ela_direction`.

    Returns:
        (B, H, N, E), in memory as (B, N, H, E).
    """
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _forward(q, k, v, kind, save)[0].transpose(1, 2)


@torch.library.custom_op("visionattn::moments", mutates_args=())
@on_device
def _forward(q: Tensor, k: Tensor, v: Tensor, kind: str, save: bool) -> tuple[Tensor, Tensor]:
    B, H, N, _ = q.shape
    D, E = _padded(q, v)
    plan = plan_moments(N, B * H, max(D, E), q.dtype != torch.float32)
    o, state = output_like(v), _states(q, v, B * H)
    flags, parts = _workspace(q, v, plan)
    kernels.forward[plan.grid(B * H)](
        *(q, k, v, o, state, parts, flags),
        *(*q.stride(), *k.stride(), *v.stride(), o.stride(0), o.stride(2), o.stride(1)),
        *(H, N, B * H * plan.chunks, plan.chunks, plan.readers),
        WIDTH=q.shape[-1],
        VALUE_WIDTH=v.shape[-1],
        D=D,
        E=E,
        BLOCK=plan.block,
        QUERY_BLOCK=plan.query_block,
        SAMPLE=_sample(q),
        STAGES=plan.stages,
        MAP=KINDS[kind],
        WHOLE=plan.whole,
        SAVE=save,
        P=_precision(q),
        num_warps=plan.warps,
    )
    return o, state


@_forward.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, kind: str, save: bool) -> Any:
    return output_like(v), _states(q, v, q.shape[0] * q.shape[1])


@torch.library.custom_op("visionattn::moments_backward", mutates_args=("dq", "dk", "dv"))
@on_device
def _backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, state: Tensor, kind: str, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    B, H, N, _ = q.shape
    D, E = _padded(q, v)
    plan = plan_moments_backward(N, B * H, max(D, E))
    flags, parts = _workspace(q, v, plan)
    kernels.backward[plan.grid(B * H)](
        *(q, k, v, do, dq, dk, dv, state, torch.empty_like(state), parts, flags),
        *(*q.stride(), *k.stride(), *v.stride(), *do.stride(), *dq.stride()[:3], *dv.stride()[:3]),
        *(H, N, B * H * plan.chunks, plan.chunks, plan.readers),
        WIDTH=q.shape[-1],
        VALUE_WIDTH=v.shape[-1],
        D=D,
        E=E,
        BLOCK=plan.block,
        STAGES=plan.stages,
        MAP=KINDS[kind],
        WHOLE=plan.whole,
        P=_precision(q),
        num_warps=plan.warps,
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.kind, _ = inputs
    ctx.save_for_backward(q, k, v, output[1])
    ctx.set_materialize_grads(False)


@full_precision
def _gradients(ctx: Any, do: Tensor | None, _: Any) -> tuple[Any, ...]:
    q, k, v, state = ctx.saved_tensors
    if do is None:
        return (None,) * 5
    do = do.transpose(1, 2)
    if torch.is_grad_enabled():  # create_graph=True: the gradient shall have a gradient
        return *_eager_gradients(q, k, v, do, ctx.kind), None, None
    dq, dk, dv = gradients_like(q, k, v)
    _backward(q, k, v, do, state, ctx.kind, dq, dk, dv)
    return dq, dk, dv, None, None


_forward.register_autograd(_gradients, setup_context=_remember)


def _eager_gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor, kind: str) -> list[Tensor | None]:
    """Differentiate the eager formula, differentiably."""
    inputs = q, k, v = [x.view_as(x) for x in (q, k, v)]  # one may depend on another
    if kind == "direction":
        o = signed.linear(ela_direction.query_features(q), ela_direction.key_features(k), v)
    else:
        o = distance.linear(q, -k if kind == "diff" else k, v)
    return differentiable_gradients(o, inputs, do)


def _precision(x: Tensor) -> str:
    return HALF_PRECISION if x.dtype != torch.float32 and x.is_cuda else "ieee"


def _sample(x: Tensor) -> int:
    """Return how many tokens to take origins from: rounding in float32 is seen the more, the farther those are off."""
    return 256 if x.dtype == torch.float32 else 32


def _padded(q: Tensor, v: Tensor) -> tuple[int, int]:
    """Return D and E as kernels have them: powers of two from 16 on."""
    return padded(q.shape[-1]), padded(v.shape[-1])


def _states(q: Tensor, v: Tensor, count: int) -> Tensor:
    """Return memory for states, each of them a row."""
    D, E = _padded(q, v)
    return q.new_empty(count, D * E + D + 2 * E + 16, dtype=torch.float32)


def _workspace(q: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return the heads' flags, lowered, and memory for what every chunk leaves."""
    heads = 0 if plan.whole else q.shape[0] * q.shape[1]
    return q.new_zeros(heads, dtype=torch.int32), _states(q, v, heads * plan.chunks)
