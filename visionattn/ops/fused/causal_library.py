"""Causal attention by positive features as an operator of PyTorch, with gradients of any order."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from visionattn.ops import positive, scan
from visionattn.ops.fused import causal as kernels
from visionattn.ops.fused.buffers import (
    differentiable_gradients,
    padded,
)

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Leave autocast in a backward function, which may be called within it; the forward one has left it."""

    @wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return precise


def output_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory for an output or a gradient, (B, H, N, D) as x is, that lies as (B, N, H, D).

    It is no view of a tensor of another shape: an operator that returns a view forbids its users to change it in place.
    """
    B, H, N, D = x.shape
    return x.new_empty_strided((B, H, N, D), (N * H * D, D, H * D, 1), dtype=dtype)


def attend_causal(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """Attend from each token to itself and those before it by fused kernels, in O(N F E) time.

    The logarithms of features are made by PyTorch: unlike :func:`visionattn.ops.fused.library.attend`, this serves any
    map, at the price of features in memory. A key mask is applied as the eager formula does it: -1e30 for the
    logarithms and 0 for the values of what is not kept.

    Args:
        a: logarithms of the queries' features, (B, H, N, F), of any strides and of any size; as b, in float16,
            bfloat16 or float32.
        b: those of the keys', (B, H, N, F).
        v: values, (B, H, N, E), in one of the same types.

    Returns:
        (B, H, N, E), in memory as (B, N, H, E).
    """
    return _forward(a, b, v, torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, v)))[0]


class Plan(NamedTuple):
    """Sizes of a launch, a function of shapes alone, so that sums are the same on every machine.

    Attributes:
        chunks: parts of a head, each of which one program goes through.
        features: padded number of features, F.
        values: padded width of values, E.
        feature_tile: features of one program where one needs not all of them.
        value_tile: values likewise.
        warps: of a program with all values.
        reader_warps: of one with all features.
    """

    chunks: int
    features: int
    values: int
    feature_tile: int
    value_tile: int
    warps: int
    reader_warps: int


def plan(a: Tensor, v: Tensor) -> Plan:
    """Choose for logarithms (B, H, N, F) and values (B, H, N, E)."""
    F, E = padded(a.shape[-1]), padded(v.shape[-1])
    chunk = 128 if v.shape[:-1].numel() <= 65536 else 256
    feature_tile = min(F, 64, max(16, 4096 // E))
    value_tile = min(E, max(16, (4096 if v.dtype == torch.float32 else 8192) // F))
    warps, reader_warps = (8 if size >= 4096 else 4 for size in (feature_tile * E, F * value_tile))
    return Plan(max(1, v.shape[-2] // chunk), F, E, feature_tile, value_tile, warps, reader_warps)


@torch.library.custom_op("visionattn::causal", mutates_args=())
def _forward(a: Tensor, b: Tensor, v: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, N, _ = v.shape
    sizes = plan(a, v)
    o, wide, peaks, totals = _outputs(v, save)
    state = _joined(b, v, None, sizes)
    kernels.forward[(B * H * sizes.chunks, sizes.values // sizes.value_tile)](
        *(a, b, v, o, wide, peaks, totals, *state),
        *(*a.stride(), *b.stride(), *v.stride(), *o.stride()[:3], H, N, sizes.chunks),
        WIDTH=a.shape[-1],
        VALUE_WIDTH=v.shape[-1],
        F=sizes.features,
        VALUES=sizes.values,
        E=sizes.value_tile,
        SAVE=save,
        WIDE=len(wide) > 0,
        P=_precision(v),
        num_warps=sizes.reader_warps,
    )
    return o, wide, peaks, totals


@_forward.register_fake
def _forward_shapes(a: Tensor, b: Tensor, v: Tensor, save: bool) -> Any:
    return _outputs(v, save)


@torch.library.custom_op("visionattn::causal_backward", mutates_args=())
def _backward(
    a: Tensor, b: Tensor, v: Tensor, do: Tensor, o: Tensor, peaks: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, E = v.shape
    sizes = plan(a, v)
    tiles = sizes.features // sizes.feature_tile
    da, db, dv = (output_like(x) for x in (a, b, v))
    dvs = dv.unsqueeze(0) if tiles == 1 else v.new_empty(tiles, B, N, H, E, dtype=torch.float32).transpose(2, 3)
    marks = a.new_empty(B * H, triton.cdiv(N, kernels.BLOCK.value), sizes.features, dtype=torch.float32)
    queries = peaks, totals, torch.empty_like(peaks), marks
    given = *a.stride(), *b.stride(), *v.stride(), *do.stride()
    options = {
        "WIDTH": a.shape[-1],
        "VALUE_WIDTH": E,
        "FEATURES": sizes.features,
        "F": sizes.feature_tile,
        "E": sizes.values,
        "P": _precision(v),
        "num_warps": sizes.warps,
    }
    state = _joined(b, v, None, sizes)
    kernels.query_gradients[(B * H * sizes.chunks, tiles)](
        *(a, b, v, o, do, da, *queries, *state),
        *(*given, *da.stride()[:3], *o.stride()[:3], H, N, sizes.chunks),
        **options,
    )
    state = _joined(a, do, queries, sizes)
    kernels.key_gradients[(B * H * sizes.chunks, tiles)](
        *(a, b, v, do, db, dvs, *queries, *state),
        *(*given, *db.stride()[:3], *dvs.stride()[:4], H, N, sizes.chunks),
        **options,
    )
    if tiles > 1:
        dv.copy_(dvs.sum(0))
    return da, db, dv


@_backward.register_fake
def _backward_shapes(a: Tensor, b: Tensor, v: Tensor, *_: Any) -> Any:
    return output_like(a)(b)(v)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, v, save = inputs
    o, wide, peaks, totals = output
    if save:
        ctx.save_for_backward(a, b, v, wide if len(wide) else o, peaks, totals)
    ctx.set_materialize_grads(False)


@full_precision
def _gradients(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if do is None:
        return None, None, None, None
    a, b, v, *rest = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradient shall have a gradient
        return *_eager_gradients(a, b, v, do), None
    o, peaks, totals = rest
    return *_backward(a, b, v, do, o, peaks, totals), None


_forward.register_autograd(_gradients, setup_context=_remember)


def _eager_gradients(a: Tensor, b: Tensor, v: Tensor, do: Tensor) -> list[Tensor | None]:
    """Differentiate the eager formula, differentiably."""
    inputs = a, b, v = [x.view_as(x) for x in (a, b, v)]  # one may depend on another
    return differentiable_gradients(scan.causal(positive, a, b, v), inputs, do)


def _joined(
    logs: Tensor, values: Tensor, queries: tuple[Tensor, ...] | None, sizes: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states of all keys before each chunk but the first, or of all queries after each but the last.

    Args:
        logs: (B, H, N, F).
        values: (B, H, N, E).
        queries: what kernels take beside, peaks, totals, deltas and marks. None: keys.
        sizes: of the launch.

    Returns:
        ``top`` and ``mass``, (B H parts, F), and ``slots``, (B H parts, F, E), for one part less than there are chunks.
    """
    B, H, N, _ = logs.shape
    F, E, parts = sizes.features, sizes.values, sizes.chunks - 1
    top, mass = (logs.new_empty(B * H * parts, F, dtype=torch.float32) for _ in range(2))
    slots = logs.new_empty(B * H * parts, F, E, dtype=torch.float32)
    if parts:
        kernels.gather[(B * H * parts, F // sizes.feature_tile)](
            *(logs, values, *(queries or (None,) * 4), top, mass, slots),
            *(*logs.stride(), *values.stride(), H, N, parts),
            WIDTH=logs.shape[-1],
            VALUE_WIDTH=values.shape[-1],
            FEATURES=F,
            F=sizes.feature_tile,
            E=E,
            QUERIES=queries is not None,
            P=_precision(values),
            num_warps=sizes.warps,
        )
        kernels.join[(B * H, F // 16)](
            *(queries[-1] if queries else None, top, mass, slots, N, parts),
            FEATURES=F,
            F=16,
            E=E,
            QUERIES=queries is not None,
            num_warps=4,
        )
    return top, mass, slots


def _precision(values: Tensor) -> str:
    """Return how products of float32 are taken: exactly, or in three parts on tensor cores where values are short."""
    return "ieee" if values.dtype == torch.float32 else "tf32x3"


def _outputs(v: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return memory for the output and for what is saved: the same in float32 if it is not, peaks and totals."""
    o, wide, peaks, totals = output_like(v), *(v.new_empty(0, dtype=torch.float32) for _ in range(3))
    if save:
        peaks, totals = (v.new_empty(v.shape[:-1], dtype=torch.float32) for _ in range(2))
        if v.dtype != torch.float32:
            wide = torch.empty_like(o, dtype=torch.float32)
    return o, wide, peaks, totals
