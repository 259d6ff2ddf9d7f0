"""timm's pre-norm block, for attention that takes the grid of the tokens."""

from typing import Any, Final

from timm.models.vision_transformer import ATTN_LAYERS, Block
from torch import Tensor, nn

from visionattn.attention import ATTENTION, Attention


class PreNormBlock(Block):
    """``x + Attn(Norm(x))``, then ``x + MLP(Norm(x))``: timm's block with its constructor and its parameter names.

    It adds two things: ``attn_layer`` may be a name in :data:`visionattn.attention.ATTENTION`, and ``forward`` hands
    ``grid`` on to the attention if that is one of ours; timm's own has no use for it. As ``block_fn`` of timm's vision
    transformers, which pass no grid, it computes what timm's block does.

    Raises:
        UnknownNameError: no such attention.
    """

    takes_grid: Final[bool]

    def __init__(
        self, dim: int, num_heads: int, *args: Any, attn_layer: str | type[nn.Module] = "attn", **kwargs: Any
    ) -> None:
        super().__init__(dim, num_heads, *args, attn_layer=_found(attn_layer), **kwargs)
        self.takes_grid = isinstance(self.attn, Attention)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Map tokens (B, N, dim) to (B, N, dim); the arguments are those of :class:`visionattn.attention.Attention`."""
        x = x + self.drop_path1(self.ls1(self.attend(x, attn_mask, is_causal, grid)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attend(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, grid: tuple[int, int] | None) -> Tensor:
        """Return ``Attn(Norm(x))``."""
        x = self.norm1(x)
        if self.takes_grid:
            return self.attn(x, attn_mask=attn_mask, is_causal=is_causal, grid=grid)
        return self.attn(x, attn_mask=attn_mask, is_causal=is_causal)


def _found(attn_layer: str | type[nn.Module]) -> str | type[nn.Module]:
    if isinstance(attn_layer, str) and attn_layer not in ATTN_LAYERS:
        return ATTENTION[attn_layer]
    return attn_layer
