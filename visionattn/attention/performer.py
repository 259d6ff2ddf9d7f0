"""Performer."""

from typing import Any

import torch
from torch import Tensor

from visionattn.attention.features import RandomFeatures, at_least_one
from visionattn.attention.linear import PositiveAttention
from visionattn.errors import ConfigError
from visionattn.ops import performer, softmax
from visionattn.ops.draws import gaussian
from visionattn.ops.fused import FeatureMap, softmax_features


class PerformerAttention(RandomFeatures, PositiveAttention):
    """FAVOR+ (arXiv 2009.14794): positive random features that estimate softmax's kernel without bias; O(N F).

    The estimate's spread grows with ``exp(|q + k|^2 / sqrt(D))``: it is good for short queries and keys, and noise for
    long ones. The draws are fixed by the seed; they are never drawn anew in training.

    Args:
        features: draws F a head.
        draws: ``orthogonal`` in blocks of head_dim, or ``iid``.
        feature_map: ``exp``; or ``relu``, which is the source's generalised attention: it does not estimate softmax
            attention, though it is often called Performer.
        seed: of the draws.
        **kwargs: as for :class:`~visionattn.attention.Attention`.

    Raises:
        ConfigError: an option is not one of these.
    """

    draws: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        features: int = 256,
        draws: str = "orthogonal",
        feature_map: str = "exp",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        if feature_map not in ("exp", "relu"):
            raise ConfigError(f"performer: feature_map={feature_map!r}; accepted: exp, relu")
        self.features, self.how, self.feature_map, self.seed = at_least_one(features=features), draws, feature_map, seed
        self.random = feature_map == "exp"
        self.register(device, dtype)

    def draw(self) -> dict[str, Tensor]:
        return {"draws": gaussian(self.num_heads, self.features, self.head_dim, self.seed, self.how)}

    def log_features(self, x: Tensor) -> Tensor:
        if self.feature_map == "exp":
            return performer.exponential_log_features(performer.scaled(x), self.draws)
        return performer.relu_log_features(x, self.draws)

    def fused_map(self) -> FeatureMap | None:
        return softmax_features(self.draws) if self.feature_map == "exp" else None

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        a, b = self.log_features(q), self.log_features(k)
        return (a.unsqueeze(-2) + b.unsqueeze(-3)).logsumexp(-1)

    def log_target(self, q: Tensor, k: Tensor) -> Tensor:
        return softmax.log_kernel(q, k) if self.random else self.log_kernel(q, k)
