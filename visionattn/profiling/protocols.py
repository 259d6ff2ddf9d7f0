"""Random queries, keys and values to compare attention outputs on, and the comparison."""

import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict
from torch import Tensor

from visionattn.attention import ATTENTION, Attention, exact_kernel
from visionattn.attention.features import RandomFeatures
from visionattn.attention.slay import SlayAttention
from visionattn.ops import slay, yat

Options = dict[str, str | int | float]
"""Of a mechanism's constructor."""


class Result(BaseModel):
    """Base of what is measured: as JSON, what is not a number is null."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")


Keep = Callable[[Sequence[Result]], None]
"""Takes the rows so far, after every size that is measured: what a run that is cut short leaves."""


def keep_nothing(rows: Sequence[Result]) -> None:
    """Leave no rows."""


Number = Annotated[float, AfterValidator(lambda x: float(f"{x:.5g}"))]
"""Five digits of what was measured."""


class Spread(Result):
    """Mean and standard deviation over seeds, of inputs and draws at once."""

    mean: Number
    std: Number

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        found = list(values)
        return cls(mean=statistics.fmean(found), std=statistics.stdev(found) if len(found) > 1 else 0.0)


@dataclass(frozen=True)
class Inputs:
    """What mechanisms are given, and what is done to their output before it is compared.

    Attributes:
        q: queries, (B, H, N, D).
        k: keys, (B, H, N, D).
        v: values, (B, H, N, D).
        is_causal: token i attends to tokens 0..i.
        weight: of a linear map of the joined heads, (H D, H D); None for none.
        bias: of that map, (H D,).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    is_causal: bool = False
    weight: Tensor | None = None
    bias: Tensor | None = None

    def project(self, mixed: Tensor) -> Tensor:
        """Map mixed values, (B, H, N, D), to what is compared."""
        if self.weight is None:
            return mixed
        return torch.nn.functional.linear(mixed.transpose(1, 2).flatten(2), self.weight, self.bias)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Return the same rounded to a type."""
        tensors: dict[str, Any] = {name: x.to(dtype) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Protocol:
    """A named law of inputs: ``sample`` draws some from a seed, in float64."""

    name: str
    head_dim: int
    sample: Callable[[int], Inputs]


def plain(dim: int, tokens: int = 256, heads: int = 2) -> Protocol:
    """Queries, keys and values that are independent N(0, 1), not projected."""

    def sample(seed: int) -> Inputs:
        q, k, v = torch.randn(3, 1, heads, tokens, dim, generator=_generator(seed), dtype=torch.float64)
        return Inputs(q, k, v)

    return Protocol(f"plain, head width {dim}, {tokens} tokens", dim, sample)


def clustered(dim: int, tokens: int = 256, heads: int = 2, clusters: int = 16) -> Protocol:
    """As :func:`plain`, but half of the variance of queries and keys is that of a centre that some tokens share."""

    def sample(seed: int) -> Inputs:
        generator = _generator(seed)
        q, k, v = torch.randn(3, 1, heads, tokens, dim, generator=generator, dtype=torch.float64)
        centres = torch.randn(1, heads, clusters, dim, generator=generator, dtype=torch.float64)
        shared = centres[:, :, torch.randint(clusters, (tokens,), generator=generator)]
        return Inputs((q + shared) * 0.5**0.5, (k + shared) * 0.5**0.5, v)

    return Protocol(f"clustered, head width {dim}, {tokens} tokens", dim, sample)


def ablation(tokens: int, bias: bool, dim: int = 16, heads: int = 4, batch: int = 1) -> Protocol:
    """The protocol of SLAY's ablation (arXiv 2602.04915): causal, projected, compared after the output projection.

    N(0, 1) tokens of width ``heads dim`` go through one linear layer for queries, keys and values, the output through
    another, both initialised as PyTorch does by default. The source has biases in both. The one of the output is common
    to all mechanisms, and makes all of them look closer to each other than their attention is.
    """
    width = heads * dim

    def sample(seed: int) -> Inputs:
        generator = _generator(seed)

        def linear(*shape: int) -> Tensor:
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
            return (2 * drawn - 1) * width**-0.5

        x = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
        weights, biases = [linear(3 * width, width), linear(width, width)], [linear(3 * width), linear(width)]
        if not bias:
            biases = [torch.zeros_like(b) for b in biases]
        packed = torch.nn.functional.linear(x, weights[0], biases[0])
        q, k, v = packed.reshape(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
        return Inputs(q, k, v, True, weights[1], biases[1])

    how = "with" if bias else "without"
    return Protocol(f"SLAY's ablation {how} biases, head width {dim}, {tokens} tokens", dim, sample)


def square_features(x: Tensor) -> Tensor:
    """Return features of the squared cosine, D (D + 1) / 2 of them."""
    return slay.exact_features(yat.unit(x))


SQUARE: type[Attention] = exact_kernel(square_features, square_features)
"""Attention by the squared cosine alone, ``x^2``: the control of SLAY, without its denominator."""


def build(mechanism: str, options: Options, inputs: Inputs, seed: int) -> Attention:
    """Return a mechanism for inputs, without projections; the seed is that of its random features.

    Args:
        mechanism: in :data:`~visionattn.attention.ATTENTION`, or ``x^2``.
        options: of its constructor.
        inputs: that it is to be given, of whose width and type it is made.
        seed: of its draws, and of parameters that start at random.
    """
    _, heads, _, dim = inputs.q.shape
    cls = SQUARE if mechanism == "x^2" else ATTENTION[mechanism]
    drawn: dict[str, Any] = {"seed": seed} if issubclass(cls, RandomFeatures) else {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", UserWarning)  # signed features are measured here, not used
        layer = cls(heads * dim, heads, projections=False, **(drawn | options))
    return layer.to(inputs.q.dtype).eval()


def given(layer: Attention, inputs: Inputs) -> Inputs:
    """Return what a mechanism reads of the inputs: one without queries and keys takes the values for them."""
    return replace(inputs, q=inputs.v, k=inputs.v) if layer.streams == 1 else inputs


@torch.no_grad()
def output(layer: Attention, inputs: Inputs) -> Tensor:
    """Return the output of a mechanism by its fast form; SLAY's, of any number of features, from its kernel."""
    if isinstance(layer, SlayAttention):
        return weighted(layer.kernel(inputs.q, inputs.k), inputs)
    return inputs.project(layer.attend(inputs.q, inputs.k, inputs.v, None, inputs.is_causal))


@torch.no_grad()
def truth(layer: Attention, inputs: Inputs) -> Tensor:
    """Return the output of attention by the exact kernel that a mechanism has or estimates."""
    return inputs.project(layer.target(inputs.q, inputs.k, inputs.v, inputs.is_causal))


def weighted(kernel: Tensor, inputs: Inputs) -> Tensor:
    """Return the output of attention by a kernel of all pairs, (B, H, N, N), normalised by its sum."""
    kernel = kernel.tril() if inputs.is_causal else kernel
    return inputs.project(kernel @ inputs.v / kernel.sum(-1, keepdim=True))


def cosines(inputs: Inputs) -> Tensor:
    """Return the cosines of all queries and keys, (B, H, N, N)."""
    return yat.unit(inputs.q) @ yat.unit(inputs.k).transpose(-2, -1)


def deviation(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the relative L2 error of an output and its cosine to what is expected, both over all numbers of it."""
    found, expected = found.double(), expected.double()
    size = float(expected.norm())
    error = float((found - expected).norm()) / size
    scale = float(found.norm()) * size
    return error, float((found * expected).sum()) / scale if scale else 0.0


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
