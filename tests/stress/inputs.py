"""Random shapes, contents and memory layouts for fused kernels, the same ones in every run."""

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.attention import ATTENTION, Attention

DEVICE = "cuda"
ENTRYWISE = ("ela_hadamard", "elu", "relu", "cosformer")
PROJECTED = ("performer", "dark", "slay", "slay_paper")
MOMENTS = ("ela_sum", "ela_diff", "ela_direction")
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LENGTHS = ((1, 2, 3, 17, 127, 129), (577, 1023, 1025, 2049, 4097), (9999, 16385, 65537))
"""Numbers of tokens; every mechanism and type has cases of each of the three."""
CAUSAL_LENGTHS = ((33, 127, 577), (1025, 4096, 4097), (9999, 16384))
WIDTHS = (16, 24, 32, 40, 48, 64, 80, 96, 128)
PATTERNS = (
    *("normal", "outlier", "offset", "constant keys", "all equal", "uniform", "zeros", "big values"),
    *("masked", "padded"),
)
LAYOUTS = ("packed", "heads first", "tokens first", "channels first", "gaps")
NUMBERS = 2**24
"""At most so many features of all tokens; ``CAUSAL_NUMBERS`` of the image that is compared."""
CAUSAL_NUMBERS = 2**22


@dataclass(frozen=True)
class Case:
    """A call of one mechanism."""

    name: str
    dtype: str
    causal: bool
    batch: int
    heads: int
    tokens: int
    width: int
    pattern: str
    layout: str
    seed: int

    @property
    def type(self) -> torch.dtype:
        return TYPES[self.dtype]


class Inputs(NamedTuple):
    """Queries, keys and values (B, H, N, D), a key mask (B, 1, 1, N) or None, and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    upstream: Tensor


def cases(name: str, dtype: str, causal: bool) -> list[Case]:
    """Draw the cases of a mechanism and a type: one of few tokens, one of some thousands, one of many."""
    drawn = random.Random(f"{name} {dtype} {causal}")
    patterns = [p for p in PATTERNS if not (causal and p in ("masked", "padded"))]
    some = drawn.sample(patterns, 3)
    layouts = drawn.sample(LAYOUTS, 3)
    # One width for all: kernels are compiled for every width.
    width = drawn.choice([w for w in WIDTHS if w <= 64 or name != "cosformer"])  # which has two features a channel
    features = {"cosformer": 2 * width}.get(name, 256 if name in PROJECTED else width)
    found = []
    for tokens, pattern, layout in zip(CAUSAL_LENGTHS if causal else LENGTHS, some, layouts, strict=True):
        n = drawn.choice(tokens)
        batch, heads = drawn.choice((1, 2, 3, 5, 9)), drawn.choice((1, 2, 3, 5, 6, 8, 12))
        one = n * max(width, features // 2 if not causal else features)
        heads = max(1, min(heads, (CAUSAL_NUMBERS if causal else NUMBERS) // one))
        batch = max(1, min(batch, NUMBERS // (heads * one)))
        found.append(Case(name, dtype, causal, batch, heads, n, width, pattern, layout, drawn.randrange(2**31)))
    return found


def layer_of(name: str, heads: int, width: int) -> Attention:
    """Make a layer without projections, whose learned numbers are away from where they start."""
    torch.manual_seed(7)
    layer = ATTENTION[name](heads * width, heads, projections=False)
    if name == "dark":
        torch.nn.init.normal_(layer.get_parameter("shift"), std=0.1)
    return layer.to(DEVICE)


def draw(case: Case) -> Inputs:
    """Draw the numbers of a case."""
    generator = torch.Generator(DEVICE).manual_seed(case.seed)
    shape = case.batch, case.heads, case.tokens, case.width
    q, k, v, upstream = (torch.randn(shape, device=DEVICE, generator=generator) for _ in range(4))
    if case.seed % 2:  # the gradient of a sum is one number, expanded
        upstream = torch.ones(1, 1, 1, 1, device=DEVICE).expand(shape)
    q, k, v = _patterned(case, q, k, v, generator)
    return Inputs(*(x.to(case.type) for x in (q, k, v)), _mask(case, generator), upstream.to(case.type))


def _patterned(
    case: Case, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    match case.pattern:
        case "outlier":
            q[..., case.tokens // 3, :] = 60
            k[..., case.tokens // 2, :] = 60 * k[..., case.tokens // 2, :].sign()
            v[..., case.tokens // 2, :] = 500
        case "offset":
            return q + 8, k - 8, v + 30
        case "constant keys":
            k = k[..., :1, :].expand_as(k)
        case "all equal":
            q, k, v = (x[..., :1, :].expand_as(x) for x in (q, k, v))
        case "uniform":
            q, k, v = (120 * torch.rand(x.shape, device=DEVICE, generator=generator) - 60 for x in (q, k, v))
        case "zeros":
            q, k = torch.zeros_like(q), torch.zeros_like(k)
        case "big values":
            v = 2000 * v
    return q, k, v


def _mask(case: Case, generator: torch.Generator) -> Tensor | None:
    """Mask tokens at random, or the last ones; none of the first of several images takes part."""
    shape = case.batch, 1, 1, case.tokens
    if case.pattern == "masked":
        keep = torch.rand(shape, device=DEVICE, generator=generator) > 0.3
    elif case.pattern == "padded":
        keep = (torch.arange(case.tokens, device=DEVICE) <= case.tokens // 3).expand(shape).clone()
    else:
        return None
    keep[-1, ..., 0] = True
    if case.batch > 1:
        keep[0] = False
    return keep


def laid(x: Tensor, layout: str) -> Tensor:
    """Return the same numbers in other memory, as a leaf."""
    B, H, N, D = x.shape
    match layout:
        case "tokens first":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        case "channels first":
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        case "gaps":  # of NaN, which nothing may read
            wide = torch.full((B, H + 1, N + 3, D + 8), float("nan"), device=x.device, dtype=x.dtype)
            wide[:, 1:, 2:-1, :-8] = x
            x = wide[:, 1:, 2:-1, :-8]
        case _:
            x = x.contiguous()
    return x.detach().requires_grad_()
