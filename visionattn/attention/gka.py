"""Gaussian kernel attention."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.attention.base import Attention, key_mask
from visionattn.errors import ConfigError, UnsupportedError
from visionattn.ops import gka
from visionattn.ops.precision import widen


class GaussianKernelAttention(Attention):
    """``exp(-|x_i - x_j|^2 / (2 s^2))``, normalised, over the features themselves (arXiv 2605.02144); O(N^2 D).

    There are no projections of queries, keys and values: a head is a slice of the features, which are values too; one
    output projection follows. Each head learns its bandwidth s, kept as ``log_bandwidth``. It starts at sqrt(D) / 2,
    for features of unit variance: much below, every token sees itself alone; above sqrt(D), all tokens alike.
    Runs on PyTorch's fused softmax kernels, with no N x N tensor. It is symmetric, and not linear in N.

    Args:
        window: attend to tokens at most so many places away in the sequence; 0 for all. With a window, torch.export
            takes any number of tokens above it: ``torch.export.Dim("tokens", min=window + 1)``.
        **kwargs: as for :class:`~visionattn.attention.Attention`; ``qkv_bias`` is without effect.

    Raises:
        UnsupportedError: ``qk_norm`` is asked for.
        ConfigError: ``window`` is negative.
    """

    streams = 1

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        window: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)  # type: ignore[misc]
        if not isinstance(self.q_norm, nn.Identity):
            raise UnsupportedError("gka has no queries and keys to normalise; leave qk_norm=False")
        if window < 0:
            raise ConfigError(f"gka: window={window}; give a number of tokens, or 0 for all")
        self.window = window
        self.log_bandwidth = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the bandwidth to sqrt(D) / 2."""
        self.log_bandwidth.fill_(math.log(self.head_dim**0.5 / 2))

    def bandwidth(self) -> Tensor:
        """Return s of each head, (heads,), in float32 at least."""
        return widen(self.log_bandwidth).exp()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N, _ = x.shape
        x = x.reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        return x, x, x

    def place(
        self, q: Tensor, k: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        if rope is not None:
            raise UnsupportedError("gka takes distances of the features themselves: there is nothing to turn by rope")
        return q, k  # distances do not change by centring

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        return gka.attend(q, v, self.bandwidth(), key_mask(attn_mask), is_causal, self.window, dropout)

    def advance(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = v if state is None else torch.cat((state, v), -2)
        if self.window:
            state = state[..., -self.window - 1 :, :]
        return gka.attend(q, state, self.bandwidth()), state

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        logs = gka.log_kernel(q, k, self.bandwidth())
        places = torch.arange(q.shape[-2], device=q.device)
        far = (places.unsqueeze(-1) - places).abs() > (self.window or q.shape[-2])
        return logs.masked_fill(far, float("-inf"))

    def _input_projection(self, bias: bool, factory: dict[str, Any]) -> nn.Module:
        return nn.Identity()
