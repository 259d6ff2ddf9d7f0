"""Test-time training."""

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.attention.base import Attention, key_mask, refuse_order
from visionattn.errors import UnsupportedError
from visionattn.ops import ttt


class TttAttention(Attention):
    """A small network, fitted to keys and values by one step and read by queries (ViT^3, arXiv 2512.01643); O(N D^2).

    Each head learns what the step starts from, two matrices of D x D, kept as ``first`` and ``second``; they start
    small, and so does the output. It is exact, but no weighted mean: constant values do not come back, and outputs
    grow with the squared length of queries. All tokens make the step: there is no causal form. The source has one more
    head, whose network is a depthwise convolution; it is left out. There is no fused kernel for it.

    Args:
        **kwargs: as for :class:`~visionattn.attention.Attention`.

    Raises:
        UnsupportedError: ``attn_drop`` is not 0.
    """

    ordered = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)  # type: ignore[misc]
        if self.attn_drop.p:
            raise UnsupportedError(f"{type(self).__name__} has no attention weights to drop; leave attn_drop at 0")
        shape = num_heads, self.head_dim, self.head_dim
        self.first = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.second = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both matrices from a normal distribution of .02, cut off."""
        for matrix in (self.first, self.second):
            nn.init.trunc_normal_(matrix, std=0.02)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        if is_causal:
            refuse_order()
        return ttt.attend(q, k, v, self.first, self.second, key_mask(attn_mask))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The step by the gradient that PyTorch takes of the loss: there is no N x N matrix."""
        if is_causal:
            refuse_order()
        return ttt.by_autograd(q, k, v, self.first, self.second, key_mask(attn_mask))
