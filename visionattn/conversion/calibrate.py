"""Queries and keys of a network, measured on images, and projections and draws fitted to them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.attention import Attention
from visionattn.attention.exponential import ExponentialFeatures
from visionattn.errors import ConfigError
from visionattn.ops import calibration

Images = Tensor | Iterable[Any]
"""A batch (B, 3, H, W), or batches; of a tuple or list, the first part counts."""


def batches(images: Images) -> Iterator[Tensor]:
    """Go through images batch by batch; a tensor alone is taken in parts of 16.

    Raises:
        ConfigError: there are none, or what is given holds no images.
    """
    empty = True
    for batch in torch.split(images, 16) if isinstance(images, Tensor) else images:
        part = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(part, Tensor) or part.dim() != 4:
            raise ConfigError(
                f"images: got {type(part).__name__}; give a tensor (B, 3, H, W), normalised as the model wants it, or "
                "a loader of such"
            )
        empty = False
        yield part
    if empty:
        raise ConfigError("images: there are none; give a few dozen, as the model will see them")


@contextmanager
def tapped(modules: dict[str, nn.Module], see: Any) -> Iterator[None]:
    """Call ``see(path, inputs, options)`` before every call of each module."""

    def hook(path: str) -> Any:
        return lambda module, args, options: see(path, args[0], options)

    handles = [m.register_forward_pre_hook(hook(path), with_kwargs=True) for path, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Moments:
    """Means and covariances of queries and keys, (H, D) and (H, D, D), summed up over batches in float64.

    Args:
        per_image: measure about the mean of each image rather than that of all: of an attention with ``center_keys``.
    """

    def __init__(self, per_image: bool) -> None:
        self.per_image, self.count = per_image, 0
        self.sums: list[Any] = [0, 0]
        self.squares: list[Any] = [0, 0]

    def add(self, q: Tensor, k: Tensor) -> None:
        """Take queries and keys, (B, H, N, D) each."""
        for index, x in enumerate((q, k)):
            x = x.double()
            x = (x - x.mean(-2, keepdim=True) if self.per_image else x).transpose(0, 1).flatten(1, 2)
            self.sums[index] = self.sums[index] + x.sum(-2)
            self.squares[index] = self.squares[index] + x.transpose(-2, -1) @ x
        self.count += q.shape[0] * q.shape[-2]

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the mean query and key of each head."""
        q, k = (x / self.count for x in self.sums)
        return q, k

    def covariances(self, centred: bool = True) -> tuple[Tensor, Tensor]:
        """Return the covariances of queries and of keys, or their second moments."""
        found = []
        for total, square in zip(self.sums, self.squares, strict=True):
            mean = total / self.count if centred else torch.zeros_like(total)
            found.append(square / self.count - mean.unsqueeze(-1) * mean.unsqueeze(-2))
        return found[0], found[1]


@torch.no_grad()
def measure(model: nn.Module, converted: dict[str, Attention], images: Images) -> dict[str, Moments]:
    """Run images through the model as it was and measure the queries and keys that its attentions would have.

    Args:
        model: the one with softmax attention.
        converted: path -> the attention that takes the place of the module there.
        images: to run.
    """
    moments = {path: Moments(attention.center_keys) for path, attention in converted.items()}

    def see(path: str, x: Tensor, options: dict[str, Any]) -> None:
        attention = converted[path]
        q, k, _ = attention.project(x)
        q, k = attention.place(q, k, options.get("rope"), None, False)
        moments[path].add(q, k)

    device = next(model.parameters()).device
    with tapped({path: model.get_submodule(path) for path in converted}, see):
        for batch in batches(images):
            model(batch.to(device))
    return moments


@torch.no_grad()
def fit(attention: ExponentialFeatures, moments: Moments, foldable: bool) -> None:
    """Fit projections, draws and weights of an attention to its queries and keys.

    What softmax attention would make of the new projections is what it made of the old ones; the estimate of it by
    random features has a smaller spread.

    Args:
        attention: with room for weights (``calibrated``).
        moments: of its queries and keys.
        foldable: whether queries and keys are linear in the tokens. Where they are normalised or turned by rotary
            positions, the draws alone are fitted.
    """
    queries, keys = moments.covariances(centred=foldable or attention.center_keys)
    scale = attention.head_dim**-0.5  # of both: that of softmax attention
    if foldable:
        turn = calibration.balance(queries, keys)
        back = torch.linalg.inv(turn)
        _fold(attention, turn, back, moments)
        queries, keys = turn @ queries @ turn, back @ keys @ back
    device = attention.draws.device
    fresh = attention.draw()["draws"].to(device)
    draws, weights = calibration.dense_exponential(fresh, (queries + keys).to(device) * scale)
    attention.draws.copy_(draws)
    assert attention.log_weights is not None
    attention.log_weights.copy_(weights)


@torch.no_grad()
def center(attention: Attention, moments: Moments) -> None:
    """Subtract the mean key from the bias of the keys."""
    _, keys = moments.means()
    projection: Any = attention.qkv
    part = projection.bias.view(3, attention.num_heads, attention.head_dim)[1]
    part.sub_(keys.to(part.dtype))


def _fold(attention: Attention, turn: Tensor, back: Tensor, moments: Moments) -> None:
    """Fold q -> T q and k -> T^-1 (k - m_k) - T m_q into the projections.

    Products with keys change by what all keys share alone: softmax attention does not see it. The mean of q + k, which
    the spread of random features grows with, is zero then.
    """
    heads, width = attention.num_heads, attention.head_dim
    projection: Any = attention.qkv
    weight = projection.weight.view(3, heads, width, -1)
    bias = projection.bias.view(3, heads, width)
    query, key = (x.unsqueeze(-1) for x in moments.means())
    if attention.center_keys:
        query, key = torch.zeros_like(query), torch.zeros_like(key)  # the mean of each image is subtracted anyway
    for index, matrix in ((0, turn), (1, back)):
        weight[index] = (matrix @ weight[index].double()).to(weight.dtype)
        bias[index] = (matrix @ bias[index].double().unsqueeze(-1)).squeeze(-1).to(bias.dtype)
    bias[1] -= (back @ key + turn @ query).squeeze(-1).to(bias.dtype)
