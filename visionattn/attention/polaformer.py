"""PolaFormer."""

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.attention.base import softmax_over
from visionattn.attention.linear import PositiveAttention
from visionattn.ops import polaformer, positive, scan
from visionattn.ops.fused import refuse


class PolaformerAttention(PositiveAttention):
    """Kernels of same and opposite signs, half of the values each (PolaFormer, arXiv 2501.15061, section 4); O(N).

    2 D features, of which every channel learns its divisor and its power, from 1 to 5; exact for its own kernels. The
    source's gate on the output, its depthwise convolution and its table of positions are no part of the kernels and
    are left out; for the convolution there is ``local``. There is no fused kernel for it.

    Args:
        **kwargs: as for :class:`~visionattn.attention.Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        self.scale = nn.Parameter(torch.empty(num_heads, 1, self.head_dim, device=device, dtype=dtype))
        self.power = nn.Parameter(torch.empty(num_heads, 1, self.head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every divisor to softplus(0) = log 2 and every power to 3."""
        self.scale.zero_()
        self.power.zero_()

    def log_features(self, x: Tensor) -> Tensor:
        return polaformer.log_features(x, self.scale, self.power)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        same, opposite = halves(v)
        return torch.cat(
            (positive.linear(q, k, same, keep), positive.linear(polaformer.swapped(q), k, opposite, keep)), -1
        )

    @torch.jit.unused
    def fuse_causal(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor | None:
        return refuse("there is none for two kernels at once")

    @torch.jit.unused
    def causal(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        same, opposite = halves(v)
        pairs = ((q, same), (polaformer.swapped(q), opposite))
        return torch.cat([scan.causal(positive, a, k, values, keep) for a, values in pairs], -1)

    def advance(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        a, b = self.queries(q), self.keys(k)
        same, opposite = halves(v)
        first, second = (None, None) if state is None else state
        near, first = scan.step(positive, a, b, same, first)
        far, second = scan.step(positive, polaformer.swapped(a), b, opposite, second)
        return torch.cat((near, far), -1), (first, second)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        kernels = polaformer.log_kernels(q, k, self.scale, self.power)
        pairs = zip(kernels, halves(v), strict=True)
        return torch.cat([softmax_over(logs, attn_mask, is_causal) @ values for logs, values in pairs], -1)


def halves(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value channels that each of the two kernels mixes; of an odd number the first gets one more."""
    half = (v.shape[-1] + 1) // 2
    return v[..., :half], v[..., half:]
