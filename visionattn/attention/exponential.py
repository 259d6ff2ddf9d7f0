"""Positive random features of exp(q.k): what Performer and DARKFormer share."""

from typing import Any

import torch
from torch import Tensor

from visionattn.attention.base import key_mask, mean_of
from visionattn.attention.features import RandomFeatures, at_least_one
from visionattn.attention.linear import PositiveAttention
from visionattn.ops import performer
from visionattn.ops.draws import gaussian


class ExponentialFeatures(RandomFeatures, PositiveAttention):
    """Features ``exp(w.x - |x|^2 / 2)`` of draws w, whose products estimate ``exp(q.k / sqrt(D))`` without bias.

    The estimate's spread grows with ``exp(|q + k|^2 / sqrt(D))``. Moving all keys by one vector changes no attention
    weight, but changes the spread: ``center_keys`` makes the mean of q + k zero in every image.

    Args:
        features: draws F a head.
        draws: ``orthogonal`` in blocks of head_dim, or ``iid``.
        seed: of the draws.
        calibrated: keep a weight a draw in the buffer ``log_weights``, zeros at first: draws that are fitted to data
            (:func:`visionattn.convert`) are no sample of N(0, I), and their weights make up for it.
        **kwargs: as for :class:`~visionattn.attention.Attention`.
    """

    draws: Tensor
    log_weights: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        features: int = 256,
        draws: str = "orthogonal",
        seed: int = 0,
        calibrated: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        self.features, self.how, self.seed = at_least_one(features=features), draws, seed
        self.calibrated, self.random = calibrated, True
        self.register_buffer("log_weights", None)
        self.register(device, dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the content of a pickled module, which has no weights if it is older than they are."""
        super().__setstate__({"calibrated": False} | state)
        self._buffers.setdefault("log_weights", None)

    def draw(self) -> dict[str, Tensor]:
        draws = gaussian(self.num_heads, self.features, self.head_dim, self.seed, self.how)
        weights = {"log_weights": torch.zeros(self.num_heads, 1, self.features)} if self.calibrated else {}
        return {"draws": draws} | weights

    def warp(self, x: Tensor) -> Tensor:
        """Return the vectors whose products are the logarithm of the kernel, in float32 at least."""
        return performer.scaled(x)

    def log_features(self, x: Tensor) -> Tensor:
        return performer.exponential_log_features(self.warp(x), self.draws)

    def keys(self, k: Tensor) -> Tensor:
        logs, weights = self.log_features(k), self.log_weights
        return logs if weights is None else logs + weights.to(logs.dtype)

    def center(self, q: Tensor, k: Tensor, attn_mask: Tensor | None) -> Tensor:
        keep = key_mask(attn_mask)
        middle = mean_of(k, keep)
        return middle + mean_of(q, keep) if self.random else middle

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.queries(q).unsqueeze(-2) + self.keys(k).unsqueeze(-3)).logsumexp(-1)
