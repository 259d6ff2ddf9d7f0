"""Performer."""

from typing import Any

from torch import Tensor

from visionattn.attention.exponential import ExponentialFeatures
from visionattn.errors import ConfigError
from visionattn.ops import performer, softmax
from visionattn.ops.fused import FeatureMap, softmax_features


class PerformerAttention(ExponentialFeatures):
    """FAVOR+ (arXiv 2009.14794): positive random features that estimate softmax's kernel without bias; O(N F).

    The estimate's spread grows with ``exp(|q + k|^2 / sqrt(D))``: it is good for short queries and keys, and noise for
    long ones. The draws are fixed by the seed; they are never drawn anew in training.

    Args:
        feature_map: ``exp``; or ``relu``, which is the source's generalised attention: it does not estimate softmax
            attention, though it is often called Performer.
        **kwargs: as for :class:`~visionattn.attention.exponential.ExponentialFeatures` (``features``, ``draws``,
            ``seed``, ``calibrated``) and :class:`~visionattn.attention.Attention`.

    Raises:
        ConfigError: an option is not one of these, or ``calibrated`` is asked for with ``relu``.
    """

    def __init__(self, dim: int, num_heads: int = 8, *args: Any, feature_map: str = "exp", **kwargs: Any) -> None:
        super().__init__(dim, num_heads, *args, **kwargs)
        if feature_map not in ("exp", "relu"):
            raise ConfigError(f"performer: feature_map={feature_map!r}; accepted: exp, relu")
        if self.calibrated and feature_map != "exp":
            raise ConfigError("performer: calibrated=True is for feature_map='exp', which estimates exp(q.k)")
        self.feature_map = feature_map
        self.random = feature_map == "exp"

    def log_features(self, x: Tensor) -> Tensor:
        if self.feature_map == "exp":
            return performer.exponential_log_features(self.warp(x), self.draws)
        return performer.relu_log_features(x, self.draws)

    def fused_map(self) -> FeatureMap | None:
        exponential = self.feature_map == "exp"
        return softmax_features(self.draws, log_weights=self.log_weights) if exponential else None

    def log_target(self, q: Tensor, k: Tensor) -> Tensor:
        return softmax.log_kernel(q, k) if self.random else self.log_kernel(q, k)
