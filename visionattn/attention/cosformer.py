"""cosFormer."""

from typing import Any

import torch
from torch import Tensor

from visionattn.attention.base import key_mask
from visionattn.attention.linear import PositiveAttention
from visionattn.errors import ConfigError, UnsupportedError
from visionattn.ops import cosformer, relu, scan
from visionattn.ops.fused import FeatureMap


class CosformerAttention(PositiveAttention):
    """ReLU features reweighted by the cosine of the distance in place (cosFormer, arXiv 2202.08791, equation 10); O(N).

    2 D or 4 D features; exact for its own kernel. Far tokens weigh less: those at opposite ends of a long sequence
    next to nothing.

    Args:
        axes: 1 for the place in the sequence, prefix tokens included, as in the source; 2 for row and column, which
            needs the grid in every call (``vit_lat`` and ``lat`` models pass it).
        max_tokens: length T that places are measured by; 0 for the number of tokens of the call. :meth:`step`, which
            cannot know it, needs one.
        **kwargs: as for :class:`~visionattn.attention.Attention`.

    Raises:
        ConfigError: ``axes`` is neither 1 nor 2, or ``max_tokens`` is negative or given with two axes.
    """

    positional = True
    packed = False

    def __init__(
        self, dim: int, num_heads: int = 8, *args: Any, axes: int = 1, max_tokens: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(dim, num_heads, *args, **kwargs)
        if axes not in (1, 2):
            raise ConfigError(f"cosformer: axes={axes}; accepted: 1 (place in the sequence), 2 (row and column)")
        if max_tokens < 0 or (max_tokens and axes == 2):
            raise ConfigError(f"cosformer: max_tokens={max_tokens} with axes={axes}; give 0, or a length with axes=1")
        self.axes, self.max_tokens = axes, max_tokens

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        positions = self.positions(q.shape[-2], grid, q.device)
        q, k = cosformer.log_features(q, positions), cosformer.log_features(k, positions)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            mixed = self.fuse_parts(q, k, v, key_mask(attn_mask), is_causal)
            if mixed is not None:
                return mixed
        return self.run(q, k, v, key_mask(attn_mask), is_causal)

    def fused_map(self) -> FeatureMap:
        """Return the map of what :meth:`attend` hands to kernels, which are logarithms of features already."""
        return FeatureMap("exp")

    def advance(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self.axes != 1 or not self.max_tokens:
            raise UnsupportedError("cosformer: step needs a fixed length, on one axis; set max_tokens, with axes=1")
        tokens, summary = (0, None) if state is None else state
        if tokens == self.max_tokens:
            raise UnsupportedError(f"cosformer: step {tokens + 1} is beyond max_tokens={self.max_tokens}; set more")
        positions = cosformer.line(tokens, 1, self.max_tokens, q.device)
        q, k = cosformer.log_features(q, positions), cosformer.log_features(k, positions)
        mixed, summary = scan.step(self.family(), q, k, v, summary)
        return mixed, (tokens + 1, summary)

    def positions(self, tokens: int, grid: tuple[int, int] | None, device: torch.device) -> Tensor:
        """Return where the tokens stand, (tokens, axes), in parts of the whole."""
        if self.axes == 1:
            if self.max_tokens and tokens > self.max_tokens:
                raise UnsupportedError(f"cosformer: got {tokens} tokens, but max_tokens={self.max_tokens}; set more")
            return cosformer.line(0, tokens, self.max_tokens if self.max_tokens else tokens, device)
        if grid is None:
            raise UnsupportedError(
                "cosformer: axes=2 needs grid=(H, W) in every call; use a model that passes the grid"
            )
        return cosformer.plane(grid, tokens, device)

    def feature_size(self) -> int:
        return 2**self.axes * self.head_dim

    def log_features(self, x: Tensor) -> Tensor:
        return relu.log_features(x)

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """The kernel of the tokens of one sequence, by ``axes=1``."""
        return cosformer.log_kernel(q, k, self.positions(q.shape[-2], None, q.device))
