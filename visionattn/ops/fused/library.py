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
    View,
    by_heads,
    carve,
    eager_gradients,
    gradients_for,
    mask_for,
    output_for,
    padded,
    parts_of,
    present,
)
from visionattn.ops.fused.launch import Launch, Option, lowered, on, plain
from visionattn.ops.fused.maps import FeatureMap
from visionattn.ops.fused.operators import operator
from visionattn.ops.fused.plan import Plan, plan_backward, plan_forward, smaller
from visionattn.ops.fused.sizes import Sizes, sizes_of
from visionattn.ops.packing import Projection

KINDS = {
    "exp": kernels.EXP.value,
    "elu": kernels.ELU.value,
    "relu": kernels.RELU.value,
}

HELD = 64
"""Width up to which programs with projections hold a warp, and values, at a time."""


def attend(inputs: Projection, features: FeatureMap, keep: Tensor | None = None) -> Tensor:
    """Attend over all tokens by fused kernels.

    Args:
        inputs: queries, keys and values, of any strides, in float16, bfloat16 or float32.
        features: the map of queries and keys.
        keep: key mask, broadcastable to (B, H, N, 1). A head without any key gets zeros.

    Returns:
        (B, H, N, E), in memory as (B, N, H, E); of packed inputs, (B, N, H E).
    """
    if features.draws is not None and _too_wide(inputs, features):
        return _by_pieces(inputs, features, keep)
    x, heads, k, v = inputs
    shift, keep = features.shift, mask_for(keep, inputs)
    save = torch.is_grad_enabled() and any(i is not None and i.requires_grad for i in (x, k, v, shift))
    if not plain(inputs, shift):
        o: Tensor = _forward(x, k, v, heads, keep, *features, save)[0]
        return o
    if save:
        return _Attend.apply(x, k, v, shift, heads, keep, features)
    return _launch_forward(inputs, keep, features, False)[0]


def _too_wide(inputs: Projection, features: FeatureMap) -> bool:
    """Say whether programs cannot hold a warp or the values of a head at a time."""
    queries, _, values = inputs.shapes()
    return values[-1] > HELD or (features.shift is not None and queries[-1] > HELD)


def _by_pieces(inputs: Projection, features: FeatureMap, keep: Tensor | None) -> Tensor:
    """Attend with the warp taken before the kernel, and with one piece of the values after another."""
    q, k, v = inputs.parts()
    if features.shift is not None and q.shape[-1] > HELD:
        q, k, features = features.warped(q), features.warped(k), features._replace(shift=None)
    pieces = torch.split(v, HELD, -1)
    mixed = torch.cat(
        [attend(Projection(q, inputs.heads, k, one), features, keep).transpose(1, 2) for one in pieces], -1
    )
    return mixed.flatten(2) if inputs.k is None else mixed.transpose(1, 2)


class Prepared(NamedTuple):
    """A launch with the sizes of the memory that it needs: those of its plan, and the padded F and E."""

    launch: Launch
    plan: Plan
    features: int
    values: int


def _constants(sizes: Sizes) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Return the padded D, that of features too, and E, and the constants of compilation that both kernels have."""
    D = sizes.queries[-1]
    F, E = padded(D), padded(sizes.width)
    return (F, E), (D, D, sizes.width, F, F, E)


@lru_cache(maxsize=1024)
def _prepared_forward(sizes: Sizes) -> Prepared:
    (F, E), constants = _constants(sizes)
    B, H, N, _ = sizes.queries
    best = plan_forward(N, B * H, max(F, E), sizes.types[0] != torch.float32)
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
    best = plan_backward(N, B * H, max(F, E), sizes.types[0] != torch.float32)
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
    inputs: Projection, keep: Tensor | None, features: FeatureMap, save: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the output and, if it is saved, the state of all heads."""
    sizes, (q, k, v) = sizes_of(inputs, keep, features, save)
    if features.draws is not None:
        return projected_library.launch_forward(inputs, sizes, (q, k, v), keep, features)
    launch, plan, F, E = _prepared_forward(sizes)
    x, heads = inputs.x, sizes.queries[0] * sizes.queries[1]
    with on(x):
        o, state, parts, tips, flags = output_for(inputs), None, None, None, None
        if save or not plan.whole:
            state = x.new_empty(heads * F * (E + 3), dtype=torch.float32)
        if not plan.whole:
            pieces = heads * plan.chunks
            parts, tips = carve(x, (sizes.types[1], pieces * F * E), (torch.float32, 2 * pieces * F))
            flags = lowered(x, heads)
        slots, stats = _state(state, heads, F, E)
        launch(q, k, v, keep, o, slots, stats, parts, tips, flags)
    return o, state


def _state(state: Tensor | None, heads: int, F: int, E: int) -> tuple[View | None, View | None]:
    """Return the slots (heads, F, E) and the statistics (3, heads, F) of a state."""
    if state is None:
        return None, None
    return (
        View(state, (heads, F, E), (F * E, E, 1), 0, torch.float32),
        View(state, (3, heads, F), (heads * F, F, 1), heads * F * E, torch.float32),
    )


def _launch_backward(
    inputs: Projection, keep: Tensor | None, features: FeatureMap, o: Tensor | None, do: Tensor, state: Tensor
) -> tuple[Projection, Tensor | None]:
    """Return the gradients of the inputs, and that of the shift, (H, D, D), if there is one."""
    gradients = gradients_for(inputs)
    dq, dk, dv = parts_of(gradients)
    upstream = by_heads(do, inputs)
    if o is not None:
        output = by_heads(o, inputs)
        sizes, parts = sizes_of(inputs, keep, features, True, output, upstream, dq, dv)
        others = output, upstream, dq, dk, dv
        return gradients, projected_library.launch_backward(inputs, sizes, parts, keep, features, others, state)
    sizes, (q, k, v) = sizes_of(inputs, keep, features, True, upstream, dq, dv)
    launch, plan, F, E = _prepared_backward(sizes)
    x, (B, H, _, _) = inputs.x, sizes.queries
    slots, stats = _state(state, B * H, F, E)
    with on(x):
        sums, lifts, dslots, flags = None, None, None, None
        if not plan.whole:
            pieces = B * H * plan.chunks
            sums, lifts, dslots = carve(
                x,
                (torch.float32, pieces * E * F),
                (torch.float32, (pieces + B * H) * F + B * H),
                (sizes.types[1], B * H * F * E),
            )
            flags = lowered(x, B * H)
        launch(q, k, v, keep, upstream, dq, dk, dv, slots, stats, sums, lifts, dslots, flags)
        return gradients, None


def _needed(o: Tensor, features: FeatureMap) -> Tensor | None:
    """Return the output if gradients need it: those of projected maps do."""
    return None if features.draws is None else o


class _Attend(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        shift: Tensor | None,
        heads: int,
        keep: Tensor | None,
        features: FeatureMap,
    ) -> Tensor:
        o, state = _launch_forward(Projection(x, heads, k, v), keep, features, True)
        constants = features.draws, features.bank, features.log_weights
        ctx.save_for_backward(x, k, v, shift, keep, *constants, _needed(o, features), state)
        ctx.heads, ctx.features = heads, features._replace(draws=None, bank=None, shift=None, log_weights=None)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        x, k, v, shift, keep, draws, bank, log_weights, o, state = ctx.saved_tensors
        features = ctx.features._replace(draws=draws, bank=bank, shift=shift, log_weights=log_weights)
        return *_gradients(Projection(x, ctx.heads, k, v), keep, features, o, do, state), None, None, None


def _gradients(
    inputs: Projection, keep: Tensor | None, features: FeatureMap, o: Tensor | None, do: Tensor, state: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs and of the shift."""
    if torch.is_grad_enabled():  # create_graph=True: the gradient shall have a gradient
        return tuple(_eager_gradients(inputs, keep, features, do))
    if not plain(inputs, do):
        dx, dk, dv, dshift = _backward(*_flat(inputs), keep, *features, o, do, state)
    else:
        (dx, _, dk, dv), dshift = _launch_backward(inputs, keep, features, o, do, state)
    shift = features.shift
    found = dx, *((None, None) if inputs.k is None else (dk, dv))
    return *found, None if shift is None or dshift is None else dshift.to(shift.dtype)


def _flat(inputs: Projection) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Return the inputs in the order of operators."""
    return inputs.x, inputs.k, inputs.v, inputs.heads


def _eager_gradients(inputs: Projection, keep: Tensor | None, features: FeatureMap, do: Tensor) -> list[Tensor | None]:
    """Differentiate the eager formula, differentiably."""
    mask = None if keep is None else keep.unsqueeze(-1).bool()

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return positive.linear(features.logs(q), features.key_logs(k), v, mask)

    return eager_gradients(formula, inputs, do, features.shift)


def _operate(
    x: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    heads: int,
    keep: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *features, save = rest
    o, state = _launch_forward(Projection(x, heads, k, v), keep, _map(features), save)
    return o, state if save and state is not None else x.new_empty(0, dtype=torch.float32)


def _map(values: Sequence[Any]) -> FeatureMap:
    """Return a map from an operator's arguments."""
    kind, draws, bank, shift, log_weights, gains, priors, square = values
    return FeatureMap(kind, draws, bank, shift, log_weights, tuple(gains), tuple(priors), square)


def _forward_shapes(
    x: Tensor, k: Tensor | None, v: Tensor | None, heads: int, keep: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    *features, save = rest
    inputs = Projection(x, heads, k, v)
    (B, H, N, D), _, (*_, E) = inputs.shapes()
    rows = 0 if _map(features).draws is None else N
    count = B * H * (padded(_map(features).features(D)) * (padded(E) + 3) + rows)
    return output_for(inputs), x.new_empty(count if save else 0, dtype=torch.float32)


def _operate_backward(
    x: Tensor, k: Tensor | None, v: Tensor | None, heads: int, keep: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *features, o, do, state = rest
    (dx, _, dk, dv), dshift = _launch_backward(Projection(x, heads, k, v), keep, _map(features), o, do, state)
    return present(x, dx, dk, dv, dshift)


def _backward_shapes(
    x: Tensor, k: Tensor | None, v: Tensor | None, heads: int, keep: Any, *rest: Any
) -> tuple[Tensor, ...]:
    dx, _, dk, dv = gradients_for(Projection(x, heads, k, v))
    shift = _map(rest[:-3]).shift
    dshift = None if shift is None else shift.new_empty(shift.shape, dtype=torch.float32)
    return present(x, dx, dk, dv, dshift)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, k, v, ctx.heads, keep, ctx.kind, *tensors, ctx.gains, ctx.priors, ctx.square, _ = inputs
    o, state = output
    ctx.save_for_backward(x, k, v, keep, *tensors, None if tensors[0] is None else o, state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, _: Any) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 14
    x, k, v, keep, *tensors, o, state = ctx.saved_tensors
    features = _map((ctx.kind, *tensors, ctx.gains, ctx.priors, ctx.square))
    dx, dk, dv, dshift = _gradients(Projection(x, ctx.heads, k, v), keep, features, o, do, state)
    return dx, dk, dv, None, None, None, None, None, dshift, None, None, None, None, None


INPUTS = "Tensor x, Tensor? k, Tensor? v, int heads, Tensor? keep"
MAP = (
    "str kind, Tensor? draws, Tensor? bank, Tensor? shift, Tensor? log_weights, "
    "float[] gains, float[] priors, float square"
)

_forward = operator(
    f"positive({INPUTS}, {MAP}, bool save) -> (Tensor, Tensor)",
    _operate,
    _forward_shapes,
    _differentiate,
    _remember,
)
_backward = operator(
    f"positive_backward({INPUTS}, {MAP}, Tensor? o, Tensor do, Tensor state) -> (Tensor, Tensor, Tensor, Tensor)",
    _operate_backward,
    _backward_shapes,
)
