"""Focused linear attention."""

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.attention.linear import PositiveAttention
from visionattn.errors import ConfigError
from visionattn.ops import focused


class FocusedAttention(PositiveAttention):
    """ReLU features to a power, of unchanged length (FLatten Transformer, arXiv 2308.00442, section 4.1); O(N).

    D features; exact for its own kernel. The length of a key is that of all its heads together, so heads are not
    independent. The source adds a table of positions to the keys, which fixes the number of tokens and is left out,
    and a depthwise convolution, for which there is ``local``. Fused kernels run its causal form alone.

    Args:
        power: p, by which features differ more; 1 is ``relu`` up to the divisors.
        **kwargs: as for :class:`~visionattn.attention.Attention`.

    Raises:
        ConfigError: ``power`` is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        power: float = 3.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        if power < 1:
            raise ConfigError(f"focused: power={power}; give at least 1")
        self.power = float(power)
        self.scale = nn.Parameter(torch.empty(num_heads, 1, self.head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every divisor to softplus(0) = log 2."""
        self.scale.zero_()

    def log_features(self, x: Tensor) -> Tensor:
        return focused.log_features(x, self.scale, self.power)

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return focused.log_kernel(q, k, self.scale, self.power)
