"""The kernels as operators of PyTorch, with gradients of any order."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionattn.ops import positive
from visionattn.ops.fused import positive as kernels
from visionattn.ops.fused.buffers import (
    differentiable_gradients,
    full_precision,
    gradients_like,
    on_device,
    output_like,
    padded,
)
from visionattn.ops.fused.maps import FeatureMap
from visionattn.ops.fused.plan import plan_backward, plan_forward

KINDS = {
    "exp": kernels.EXP,
    "elu": kernels.ELU,
    "relu": kernels.RELU,
    "random": kernels.RANDOM,
    "sphere": kernels.SPHERE,
}

LOG2E = kernels.LOG2E.value

HELD = 64
"""Width up to which programs with projections hold a warp, and values, at a time."""


def attend(q: Tensor, k: Tensor, v: Tensor, features: FeatureMap) -> Tensor:
    """Attend over all tokens by fused kernels.

    Args:
        q: (B, H, N, D), of any strides; as k and v, in float16, bfloat16 or float32.
        k: (B, H, N, D).
        v: (B, H, N, E).
        features: the map of queries and keys.

    Returns:
        (B, H, N, E), in memory as (B, N, H, E).
    """
    kind, draws, bank, warp, gains, priors, square = features
    if draws is not None and warp is not None and q.shape[-1] > HELD:
        features = features._replace(draws=draws.to(q.dtype), warp=None)
        q, k = (x.float() @ warp.float().transpose(-2, -1) for x in (q, k))
        return attend(q, k, v, features)
    if draws is not None and v.shape[-1] > HELD:
        parts = [attend(q, k, part, features).transpose(1, 2) for part in torch.split(v, HELD, -1)]
        return torch.cat(parts, -1).transpose(1, 2)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, warp))
    return _forward(q, k, v, kind, draws, bank, warp, gains, priors, square, save)[0].transpose(1, 2)


@torch.library.custom_op("visionattn::positive", mutates_args=())
@on_device
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    draws: Tensor | None,
    bank: Tensor | None,
    warp: Tensor | None,
    gains: Sequence[float],
    priors: Sequence[float],
    square: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    features = FeatureMap(kind, draws, bank, warp, tuple(gains), tuple(priors), square)
    B, H, N, _ = q.shape
    F, D, E = _padded(features, q, v)
    plan = plan_forward(N, B * H, F, max(D, E), q.dtype != torch.float32)
    o, slots, *stats = _outputs(features, q, v)
    flags, tops, masses = _workspace(q, B * H, 0 if plan.whole else plan.chunks, (F,), (F,))
    parts = v.new_empty(len(tops), F, E)
    constants = _constants(features, q)
    banks = constants[-1]
    kernels.forward[plan.grid(B * H)](
        *(q, k, v, o, slots, *stats),
        *constants,
        *(parts, tops, masses, flags),
        *(*q.stride(), *k.stride(), *v.stride(), o.stride(0), o.stride(2), o.stride(1)),
        *(H, N, B * H * plan.chunks, plan.chunks, plan.readers),
        FEATURES=features.features(q.shape[-1]),
        WIDTH=q.shape[-1],
        VALUE_WIDTH=v.shape[-1],
        F=F,
        D=D,
        E=E,
        BANKS=padded(banks),
        BLOCK=plan.block,
        QUERY_BLOCK=plan.query_block,
        STAGES=plan.stages,
        MAP=KINDS[kind],
        SPLIT=warp is not None,
        WHOLE=plan.whole,
        SAVE=save,
        P="ieee",
        num_warps=plan.warps,
    )
    top, mass, level = stats
    return o, slots, top, mass, level


@_forward.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, kind: str, draws: Any, bank: Any, *_: Any) -> Any:
    return _outputs(FeatureMap(kind, draws, bank), q, v)


@torch.library.custom_op("visionattn::positive_backward", mutates_args=("dq", "dk", "dv"))
@on_device
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    slots: Tensor,
    top: Tensor,
    mass: Tensor,
    level: Tensor,
    kind: str,
    draws: Tensor | None,
    bank: Tensor | None,
    warp: Tensor | None,
    gains: Sequence[float],
    square: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    features = FeatureMap(kind, draws, bank, warp, tuple(gains), square=square)
    B, H, N, _ = q.shape
    F, D, E = _padded(features, q, v)
    plan = plan_backward(N, B * H, F, max(D, E), q.dtype != torch.float32)
    flags, parts, pulls = _workspace(q, B * H, 0 if plan.whole else plan.chunks, (E, F), (F,))
    dslots, pull, scale = torch.empty_like(slots), torch.empty_like(top), torch.empty_like(top[:, 0])
    _, low, bank_in, warp_in, warp_low, packed_gains, _, square_2, each, banks = constants = _constants(features, q)
    back = None if draws is None or warp is None else draws.to(q.dtype)
    kernels.backward[plan.grid(B * H)](
        *(q, k, v, do, dq, dk, dv, slots, top, mass, level),
        *(constants[0], low, back, bank_in, warp_in, warp_low, packed_gains, square_2, each, banks),
        *(parts, pulls, dslots, pull, scale, flags),
        *(*q.stride(), *k.stride(), *v.stride(), *do.stride(), *dq.stride()[:3], *dv.stride()[:3]),
        *(H, N, B * H * plan.chunks, plan.chunks, plan.readers),
        FEATURES=features.features(q.shape[-1]),
        WIDTH=q.shape[-1],
        VALUE_WIDTH=v.shape[-1],
        F=F,
        D=D,
        E=E,
        BANKS=padded(banks),
        BLOCK=plan.block,
        STAGES=plan.stages,
        MAP=KINDS[kind],
        SPLIT=warp is not None,
        WHOLE=plan.whole,
        P="ieee",
        num_warps=plan.warps,
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.kind, draws, bank, warp, ctx.gains, ctx.priors, ctx.square, _ = inputs
    ctx.save_for_backward(q, k, v, draws, bank, warp, *output[1:])
    ctx.set_materialize_grads(False)


@full_precision
def _gradients(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Any, ...]:
    q, k, v, draws, bank, warp, *state = ctx.saved_tensors
    features = FeatureMap(ctx.kind, draws, bank, warp, tuple(ctx.gains), tuple(ctx.priors), ctx.square)
    if do is None:
        return (None,) * 11
    do = do.transpose(1, 2)
    if torch.is_grad_enabled():  # create_graph=True: the gradient shall have a gradient
        dq, dk, dv, dwarp = _eager_gradients(q, k, v, warp, do, features)
    else:
        dq, dk, dv = gradients_like(q, k, v, None if warp is None else torch.float32)
        _backward(q, k, v, do, *state, ctx.kind, draws, bank, warp, ctx.gains, ctx.square, dq, dk, dv)
        dwarp = None
        if warp is not None:
            wide = warp.float()
            dwarp = (dq.transpose(-2, -1) @ q.float() + dk.transpose(-2, -1) @ k.float()).sum(0).to(warp.dtype)
            dq, dk = (dq @ wide).to(q.dtype), (dk @ wide).to(k.dtype)
    return dq, dk, dv, None, None, None, dwarp, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_remember)


def _eager_gradients(
    q: Tensor, k: Tensor, v: Tensor, warp: Tensor | None, do: Tensor, features: FeatureMap
) -> list[Tensor | None]:
    """Differentiate the eager formula, differentiably."""
    q, k, v = (x.view_as(x) for x in (q, k, v))  # one may depend on another
    features = features._replace(warp=warp)
    inputs = [q, k, v, warp]
    return differentiable_gradients(positive.linear(features.logs(q), features.logs(k), v), inputs, do)


def _padded(features: FeatureMap, q: Tensor, v: Tensor) -> tuple[int, int, int]:
    """Return F, D and E as kernels have them: powers of two from 16 on."""
    sizes = features.features(q.shape[-1]), q.shape[-1], v.shape[-1]
    F, D, E = map(padded, sizes)
    return F, D, E


def _outputs(features: FeatureMap, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    F, _, E = _padded(features, q, v)
    heads = q.shape[0] * q.shape[1]
    top, mass, level = (q.new_empty(heads, F, dtype=torch.float32) for _ in range(3))
    return output_like(v), v.new_empty(heads, F, E), top, mass, level


def _workspace(x: Tensor, heads: int, chunks: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return the heads' flags, lowered, and memory for parts of the given shapes of every chunk."""
    parts = [x.new_empty(heads * chunks, *shape, dtype=torch.float32) for shape in shapes]
    return [x.new_zeros(heads if chunks else 0, dtype=torch.int32), *parts]


def _constants(features: FeatureMap, q: Tensor) -> tuple[Any, ...]:
    """Return what kernels take of a map: tensors in the type of the queries, and logarithms to base 2."""
    draws, low, warp, warp_low = features.draws, None, features.warp, None
    each = banks = 1
    if draws is not None:
        each = draws.shape[-2]
        if warp is not None:
            warped = draws[0].float() @ warp.float()
            draws, low = _split(warped.unsqueeze(0), q.dtype)
            warp, warp_low = _split(warp.float(), q.dtype)
        draws = (draws if q.dtype == torch.float32 else draws.to(q.dtype)).contiguous()
    bank = features.bank
    if bank is not None:
        banks, bank = len(bank), bank.to(q.dtype).contiguous()
    gains, priors = (tuple(LOG2E * x for x in values) for values in (features.gains, features.priors))
    return draws, low, bank, warp, warp_low, gains, priors, LOG2E * features.square, each, banks


def _split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two tensors of a type whose sum is x, nearly."""
    high = x.to(dtype)
    return high, (x - high.float()).to(dtype).contiguous()
