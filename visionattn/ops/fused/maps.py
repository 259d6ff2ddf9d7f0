"""Feature maps that fused kernels compute on chip, with the eager formula of each."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.ops import elu, relu, slay, yat
from visionattn.ops.precision import widen


class FeatureMap(NamedTuple):
    """A map to positive features.

    Attributes:
        kind: ``exp``, ``elu``, ``relu``: taken entry by entry, F = D features. ``random``: ``exp(g w.x - s |x|^2)`` of
            draws w. ``sphere``: ``c (a.u)^2 exp(g w.u)`` of draws w and anchors a, for unit vectors u.
        draws: w, (R, H, M, D), for each of R nodes.
        bank: a, (P, D); F = R P M.
        shift: M - I of a matrix M a head that x is multiplied by first, (H, D, D); of ``random`` only.
        log_weights: added to the logarithms of the features of keys, (H, F); of ``random`` only. It has no gradient.
        gains: g of each node.
        priors: ``log c`` of each node.
        square: s.
    """

    kind: str
    draws: Tensor | None = None
    bank: Tensor | None = None
    shift: Tensor | None = None
    log_weights: Tensor | None = None
    gains: tuple[float, ...] = (1.0,)
    priors: tuple[float, ...] = (0.0,)
    square: float = 0.0

    def features(self, dim: int) -> int:
        """Return F for heads of a width."""
        if self.draws is None:
            return dim
        nodes, _, each, _ = self.draws.shape
        return nodes * each * (1 if self.bank is None else len(self.bank))

    def warped(self, x: Tensor) -> Tensor:
        """Return ``M x``, (B, H, N, D), in float32 at least."""
        x = widen(x)
        return x if self.shift is None else x + x @ self.shift.to(x.dtype).transpose(-2, -1)

    def logs(self, x: Tensor) -> Tensor:
        """Return the natural logarithms of features of queries, (B, H, N, D) to (B, H, N, F), in float32 at least."""
        if self.kind == "exp":
            return widen(x)
        if self.kind == "elu":
            return elu.log_features(x)
        if self.kind == "relu":
            return relu.log_features(x)
        assert self.draws is not None
        if self.kind == "random":
            x = self.warped(x)
            projected = x @ self.draws[0].to(x.dtype).transpose(-2, -1)
            return self.gains[0] * projected - self.square * x.square().sum(-1, keepdim=True)
        assert self.bank is not None
        u = yat.unit(x)
        logs = [
            gain * (u @ draws.to(u.dtype).transpose(-2, -1)) + prior / 2
            for gain, prior, draws in zip(self.gains, self.priors, self.draws, strict=True)
        ]
        return slay.log_product(slay.anchor_log_features(u, self.bank), torch.stack(logs, -2))

    def key_logs(self, x: Tensor) -> Tensor:
        """Return the logarithms of features of keys: those of queries, and the weights that there may be."""
        logs = self.logs(x)
        return logs if self.log_weights is None else logs + self.log_weights.to(logs.dtype).unsqueeze(-2)


def softmax_features(draws: Tensor, shift: Tensor | None = None, log_weights: Tensor | None = None) -> FeatureMap:
    """Return Performer's map for draws (H, F, D), or DARKFormer's with the shift M - I of its matrix, (H, D, D).

    Draws that are no sample of N(0, I) have the logarithms of their weights, (H, 1, F), added to those of keys.
    """
    scale = draws.shape[-1] ** -0.25
    weights = None if log_weights is None else log_weights.squeeze(1)
    return FeatureMap("random", draws.unsqueeze(0), None, shift, weights, (scale,), square=scale * scale / 2)


def yat_features(draws: Tensor, bank: Tensor, scales: list[float], weights: list[float]) -> FeatureMap:
    """Return SLAY's map for draws (R, H, M, D), anchors (P, D), and the scales and weights of R nodes."""
    gains = tuple(math.sqrt(2 * s) for s in scales)
    priors = tuple(math.log(w / draws.shape[-2]) - 2 * s for s, w in zip(scales, weights, strict=True))
    draws = draws.contiguous()  # a model that is laid out channels last has its buffers of four axes so, too
    return FeatureMap("sphere", draws, bank, gains=gains, priors=priors)
