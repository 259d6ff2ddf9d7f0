"""Attention operations to be timed: mechanisms in several forms, and softmax attention by PyTorch's backends.

An operation is the whole of a module without projections, from the packed projection (B, N, 3 dim) to the mixed values
(B, N, dim); a mechanism of one stream takes (B, N, dim). All read the same strided views of the packed projection.
Parameters are frozen: the gradient is that of the input.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from visionattn.attention import ATTENTION, Attention, LinearAttention
from visionattn.attention.features import RandomFeatures
from visionattn.attention.slay import SlayAttention
from visionattn.attention.softmax import SoftmaxAttention
from visionattn.ops import switch
from visionattn.profiling.clock import Within

Form = Literal["eager", "compiled", "fused"]
FORMS: tuple[Form, ...] = ("eager", "compiled", "fused")

Direction = Literal["forward", "training", "backward"]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Of ``scaled_dot_product_attention``."""

EXACT_BLOCK = 2048
"""Queries of softmax attention in float64 whose pairs with all keys are in memory at a time."""

EXACT_ITEMS, EXACT_HEADS = 2, 2
"""Of a batch, how much is computed in float64: two items; where all pairs are formed, two heads of one item."""


@dataclass(frozen=True)
class Shape:
    """Of one operation: ``batch`` items B of ``tokens`` N, ``heads`` H of width ``head_dim`` D, of one type; causal?"""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    causal: bool = False

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.heads * self.head_dim

    @property
    def stream_bytes(self) -> int:
        """Of q, k, v or the output alone."""
        return self.batch * self.tokens * self.dim * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Entrant:
    """A mechanism in a form.

    Attributes:
        mechanism: its name; ``softmax`` for PyTorch's own.
        form: ``eager``, ``compiled``, ``fused``, or a backend.
        layer: the module.
        exact: its twin in float64, of all heads or the first ones.
        call: what is timed, of a packed projection: the module, or what was compiled of it.
        within: the context that it is called in.
        options: of the call beside its input.
    """

    mechanism: str
    form: str
    layer: Attention
    exact: Attention
    call: nn.Module
    within: Within
    options: Mapping[str, bool] = field(default_factory=dict)

    def run(self, direction: Direction, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """Return the output; and, of training, the gradient of ``x`` for the gradient ``g`` of the output."""
        out: Tensor = self.call(x, **self.options)
        if direction == "forward":
            return (out,)
        return out.detach(), *torch.autograd.grad(out, x, g)

    def truth(self, direction: Direction, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """Return the same as :meth:`run` in float64, for the first items and heads: (b, N, c) and (b, N, streams, c).

        It is computed an item at a time, by eager code, from the same numbers.
        """
        streams, width, training = self.layer.streams, self.exact.dim, direction == "training"
        items = min(EXACT_ITEMS if isinstance(self.exact, LinearAttention) else 1, len(x))
        found = []
        for index in range(items):
            one = slice(index, index + 1)
            own = apart(x.detach()[one], streams)[..., :width].double().flatten(-2).requires_grad_(training)
            with switch.kernels("eager"):
                out: Tensor = self.exact(own, **self.options)
            grads = torch.autograd.grad(out, own, g[one, :, :width].double()) if training else ()
            found.append((out.detach(), *(apart(grad, streams) for grad in grads)))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def apart(x: Tensor, streams: int) -> Tensor:
    """Return a packed projection (B, N, streams x c), or its gradient, as (B, N, streams, c)."""
    return x.reshape(*x.shape[:-1], streams, -1)


def entrants(shape: Shape, mechanisms: Sequence[str], forms: Sequence[Form], features: int) -> Iterator[Entrant]:
    """Yield the backends of softmax attention that the device may have, and mechanisms in their forms.

    Args:
        shape: of the operation.
        mechanisms: names in :data:`~visionattn.attention.ATTENTION`.
        forms: which.
        features: random features of those whose option it is to have many: performer and dark.
    """
    options = {"is_causal": True} if shape.causal else {}
    softmax = _layer("softmax", shape, shape.heads, features)
    exact = _exact("softmax", softmax, shape, features)
    for name in BACKENDS if shape.device.type == "cuda" else ("flash", "math"):
        yield Entrant("softmax", name, softmax, exact, softmax, partial(sdpa_kernel, BACKENDS[name]), options)
    for mechanism in mechanisms:
        layer = _layer(mechanism, shape, shape.heads, features)
        exact = _exact(mechanism, layer, shape, features)
        for form in forms:
            call: Any = torch.compile(layer, fullgraph=True, dynamic=False) if form == "compiled" else layer
            within = partial(switch.kernels, "fused" if form == "fused" else "eager")
            yield Entrant(mechanism, form, layer, exact, call, within, options)


def floor_work(layer: Attention, shape: Shape, direction: Direction) -> tuple[int, int]:
    """Return the bytes and the floating-point operations that no form of a mechanism can do without.

    Bytes: forward, its streams (q, k and v) are read and the output is written; backward, streams and the gradient of
    the output are read, and the gradients of the streams written. That is 4 and 7 times B H N D numbers. Operations:
    those of the state and its reading, and of projecting q and k onto random draws; backward has twice those of the
    state. Attention of all pairs is given no operations: it is held against what linear attention may reach.
    """
    if direction == "training":
        forward, backward = floor_work(layer, shape, "forward"), floor_work(layer, shape, "backward")
        return forward[0] + backward[0], forward[1] + backward[1]
    moved = (layer.streams + 1 if direction == "forward" else 2 * layer.streams + 1) * shape.stream_bytes
    if not isinstance(layer, LinearAttention):
        return moved, 0
    state, drawn = 4 * layer.feature_size(), 4 * _draws(layer)
    each = state + drawn if direction == "forward" else 2 * state + drawn
    return moved, shape.batch * shape.tokens * shape.dim * each


def _draws(layer: Attention) -> int:
    """Return how many random vectors of a head queries and keys are projected onto."""
    if isinstance(layer, SlayAttention):
        return layer.nodes * layer.features + layer.anchors
    return int(getattr(layer, "features", 0)) if isinstance(layer, RandomFeatures) else 0


def _layer(mechanism: str, shape: Shape, heads: int, features: int) -> Attention:
    options: dict[str, Any] = {"features": features} if mechanism in ("performer", "dark") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # signed features are measured here, not used
        layer = ATTENTION[mechanism](heads * shape.head_dim, heads, projections=False, **options)
    return layer.to(shape.device, shape.dtype).eval().requires_grad_(False)


def _exact(mechanism: str, layer: Attention, shape: Shape, features: int) -> Attention:
    """Return the module in float64: its parameters are those that were rounded."""
    if not isinstance(layer, LinearAttention):
        layer = _layer(mechanism, shape, min(EXACT_HEADS, shape.heads), features)
    if mechanism == "softmax":
        return ExactSoftmax(layer.dim, layer.num_heads, projections=False)
    return copy.deepcopy(layer).double()


class ExactSoftmax(SoftmaxAttention):
    """Softmax attention by its formula, a block of queries at a time; PyTorch's in float64 forms all pairs at once."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        def block(start: int) -> Tensor:
            logits = q[..., start : start + EXACT_BLOCK, :] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            if is_causal:
                rows = torch.arange(start, start + logits.shape[-2], device=q.device).unsqueeze(-1)
                logits = logits.masked_fill(torch.arange(k.shape[-2], device=q.device) > rows, -math.inf)
            return logits.softmax(-1) @ v

        starts = range(0, q.shape[-2], EXACT_BLOCK)
        return torch.cat([checkpoint(block, start, use_reentrant=False) for start in starts], -2)
