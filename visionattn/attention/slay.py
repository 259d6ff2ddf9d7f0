"""SLAY."""

import warnings
from typing import Any

import torch
from torch import Tensor

from visionattn.attention.base import allowed
from visionattn.attention.features import RandomFeatures, at_least_one
from visionattn.attention.linear import LinearAttention
from visionattn.errors import ConfigError, suggest
from visionattn.ops import positive, signed, slay, yat
from visionattn.ops.draws import gaussian
from visionattn.ops.fused import attend_causally, attend_positive, yat_features
from visionattn.ops.packing import Projection
from visionattn.ops.scan import Family


class SlayAttention(RandomFeatures, LinearAttention):
    """SLAY (arXiv 2602.04915): features for the spherical Yat kernel, ``x^2 / (2 + epsilon - 2 x)`` of a cosine x.

    O(N F) with F = R P M features a head, :meth:`feature_size`: R nodes of quadrature for ``1 / (2 + epsilon - 2 x)``,
    M random features a node for its exponential, and P features for ``x^2``, which are those of the polynomial map
    ``poly``:

    - ``exact``: P = D (D + 1) / 2; exact, and the whole then estimates the R-node kernel without bias.
    - ``anchor``: the source's default, P = ``anchors``; positive, but on average ``(1 + 2 x^2) / (D (D + 2))``:
      orthogonal tokens keep a third of the weight of aligned ones.
    - ``nystrom``, ``maclaurin``, ``tensorsketch``, P = ``anchors``: signed. The denominator may then be negative or
      vanish, and outputs leave the hull of the values: for comparison only, with a warning.

    The quadrature loses the kernel's peak: with epsilon 1e-3 the value at x = 1 is 3 for R = 2, not 1000. It is
    accurate for epsilon of 0.5 or more.

    The defaults were chosen by measurement (docs/attention.md); those of the paper are ``slay_paper``.

    Args:
        poly: polynomial map.
        nodes: R.
        features: M.
        anchors: P, without effect for ``exact``.
        epsilon: of the kernel.
        draws: of the exponential's features, ``orthogonal`` or ``iid``.
        seed: of all draws.
        **kwargs: as for :class:`~visionattn.attention.Attention`.

    Raises:
        ConfigError: an option is not one of these.
    """

    random = True
    draws: Tensor
    bank: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        poly: str = "anchor",
        nodes: int = 1,
        features: int = 16,
        anchors: int = 16,
        epsilon: float = 0.5,
        draws: str = "orthogonal",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        if poly not in slay.POLYNOMIALS:
            raise ConfigError(f"slay: poly={poly!r}; {suggest(str(poly), slay.POLYNOMIALS)}")
        if epsilon <= 0:
            raise ConfigError(f"slay: epsilon={epsilon}; give a positive number")
        self.poly, self.epsilon, self.how, self.seed = poly, epsilon, draws, seed
        self.positive = poly == "anchor"
        _, self.polynomial = slay.POLYNOMIALS[poly]
        self.nodes, self.features = at_least_one(nodes=nodes), at_least_one(features=features)
        self.anchors = at_least_one(anchors=anchors)
        self.scales, self.weights = slay.quadrature(nodes, epsilon)
        if not self.positive and poly != "exact":
            warnings.warn(
                f"slay: poly={poly!r} has signed features: denominators may be negative or vanish, and outputs are "
                "unbounded; use anchor or exact for anything but comparison",
                stacklevel=2,
            )
        self.register(device, dtype)

    def draw(self) -> dict[str, Tensor]:
        draws = gaussian(self.nodes * self.num_heads, self.features, self.head_dim, self.seed, self.how)
        bank, _ = slay.POLYNOMIALS[self.poly]
        return {
            "draws": draws.reshape(self.nodes, self.num_heads, self.features, self.head_dim),
            "bank": bank(self.anchors, self.head_dim, self.seed + 1),
        }

    def vectors(self, x: Tensor) -> Tensor:
        """Return the F features of queries or keys, or their logarithms if they are positive."""
        u = yat.unit(x)
        exponential = slay.exponential_log_features(u, self.draws, self.scales, self.weights)
        if self.positive:
            return slay.log_product(self.polynomial(u, self.bank), exponential)
        return slay.product(self.polynomial(u, self.bank), exponential.exp())

    def queries(self, q: Tensor) -> Tensor:
        return self.vectors(q)

    def keys(self, k: Tensor) -> Tensor:
        return self.vectors(k)

    def family(self) -> Family:
        return positive if self.positive else signed

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        return positive.linear(q, k, v, keep) if self.positive else signed.linear(q, k, v, keep)

    def fuse(self, inputs: Projection, keep: Tensor | None) -> Tensor | None:
        features = yat_features(self.draws, self.bank, self.scales, self.weights) if self.positive else None
        return attend_positive(inputs, features, keep)

    def fuse_causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        return attend_causally(q, k, v) if self.positive else super().fuse_causal(q, k, v)

    def square_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """The estimate of x^2 of all pairs, (B, H, N, N)."""
        a, b = (self.polynomial(yat.unit(x), self.bank) for x in (q, k))
        return a.exp() @ b.exp().transpose(-2, -1) if self.positive else a @ b.transpose(-2, -1)

    def exponential_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """The estimate of the weighted exponentials of all pairs, (B, H, N, N)."""
        features = (slay.exponential_log_features(yat.unit(x), self.draws, self.scales, self.weights) for x in (q, k))
        a, b = (logs.exp().flatten(-2) for logs in features)
        return a @ b.transpose(-2, -1)

    def kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """The estimated kernel of all pairs, (B, H, N, N), from its two factors."""
        return self.square_kernel(q, k) * self.exponential_kernel(q, k)

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return self.kernel(q, k).log()

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        kernel = self.kernel(q, k)
        weights = kernel * allowed(kernel, attn_mask, is_causal)
        return weights / weights.sum(-1, keepdim=True) @ v

    def log_target(self, q: Tensor, k: Tensor) -> Tensor:
        return yat.log_kernel(yat.unit(q), yat.unit(k), self.epsilon)


class SlayPaperAttention(SlayAttention):
    """SLAY as in the paper's language models: anchor map, R = 2, M = 16, P = 8, epsilon 1e-3, iid draws; F = 256."""

    def __init__(self, dim: int, num_heads: int = 8, *args: Any, **kwargs: Any) -> None:
        paper: dict[str, Any] = {
            "poly": "anchor",
            "nodes": 2,
            "features": 16,
            "anchors": 8,
            "epsilon": 1e-3,
            "draws": "iid",
        }
        super().__init__(dim, num_heads, *args, **(paper | kwargs))
