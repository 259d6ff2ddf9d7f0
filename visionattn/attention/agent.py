"""Agent attention."""

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.attention.base import key_mask, refuse_order
from visionattn.attention.features import at_least_one
from visionattn.attention.linear import WholeAttention
from visionattn.errors import ConfigError, UnsupportedError
from visionattn.ops import agent


class AgentAttention(WholeAttention):
    """Agents, mean queries of groups of tokens, gather the values; queries read the agents (arXiv 2312.08874); O(N n).

    n features; exact for its own weights, which are two softmaxes and their product. The source's biases, which fix the
    grid, are left out, and so is its depthwise convolution, for which there is ``local``. All tokens make the agents:
    there is no causal form. There is no fused kernel for it.

    Args:
        agents: n. The sequence is divided in n, or the grid in the root of n rows and as many columns.
        axes: 1 for groups of the sequence, prefix tokens included; 2 for groups of rows and columns, without prefix
            tokens, as in the source, which needs the grid in every call (``vit_lat`` and ``lat`` models pass it).
        **kwargs: as for :class:`~visionattn.attention.Attention`.

    Raises:
        ConfigError: ``axes`` is neither 1 nor 2, or ``agents`` is below 1 or, with two axes, not a square.
    """

    positional = True

    def __init__(
        self, dim: int, num_heads: int = 8, *args: Any, agents: int = 49, axes: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(dim, num_heads, *args, **kwargs)
        if axes not in (1, 2):
            raise ConfigError(f"agent: axes={axes}; accepted: 1 (groups of the sequence), 2 (of rows and columns)")
        self.agents, self.axes, self.side = at_least_one(agents=agents), axes, isqrt(agents)
        if axes == 2 and self.side**2 != agents:
            raise ConfigError(f"agent: agents={agents} with axes=2; give a square, such as {max(self.side, 1) ** 2}")

    def features(
        self, q: Tensor, k: Tensor, keep: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        return agent.log_features(q, k, self.groups(q, keep, grid), keep)

    def groups(self, q: Tensor, keep: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
        """Return which tokens are in which group, broadcastable to (B, H, n, N)."""
        if self.axes == 1:
            return agent.line(q, self.agents, keep)
        if grid is None:
            raise UnsupportedError("agent: axes=2 needs grid=(H, W) in every call; use a model that passes the grid")
        return agent.plane(q, self.side, grid, keep)

    def feature_size(self) -> int:
        return self.agents

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The two softmaxes of the tokens of one sequence, by ``axes=1``."""
        if is_causal:
            refuse_order()
        keep = key_mask(attn_mask)
        kept = torch.ones_like(q[..., 0], dtype=torch.bool) if keep is None else keep[..., 0].expand_as(q[..., 0])
        heads = zip(q.flatten(0, 1), kept.flatten(0, 1), strict=True)
        agents = [F.adaptive_avg_pool1d(x[rows].T, self.agents).T for x, rows in heads]
        return agent.weights(q, k, torch.stack(agents).reshape(*q.shape[:2], self.agents, -1), keep) @ v
