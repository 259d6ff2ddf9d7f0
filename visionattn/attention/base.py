"""The contract that every mechanism keeps: timm's constructor, timm's parameter names, timm's forward."""

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.errors import ConfigError, UnsupportedError


class Attention(nn.Module):
    """Multi-head self-attention with the projections of ``timm.layers.Attention``; a subclass gives :meth:`attend` and
    :meth:`reference`.

    Input and output are (B, N, dim). Parameters are named as timm names them (``qkv``, ``proj``, ``q_norm``,
    ``k_norm``, ``norm``), so a checkpoint of either loads into the other.

    Args:
        dim: width C of a token.
        num_heads: heads H; must divide ``dim``.
        qkv_bias: bias in the query, key and value projections.
        qk_norm: normalise queries and keys per head by ``norm_layer``.
        scale_norm: normalise the mixed values by ``norm_layer`` before the output projection.
        proj_bias: bias in the output projection.
        attn_drop: probability of dropping an attention weight; only where the N x N matrix exists.
        proj_drop: dropout after the output projection.
        norm_layer: constructor called with a width; needed by ``qk_norm`` and ``scale_norm``.
        device: where parameters are made.
        dtype: their type.
        projections: False where the caller projects by itself (a convolution with folded normalisation, say): the
            input is then the packed projection (B, N, 3 dim), and the output is the mixed values (B, N, dim).

    Raises:
        ConfigError: ``num_heads`` does not divide ``dim``, or a normalisation lacks its ``norm_layer``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        projections: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"dim={dim} is not divisible by num_heads={num_heads}; choose heads that divide it")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory) if projections else nn.Identity()
        self.q_norm = _norm(norm_layer, self.head_dim, factory) if qk_norm else nn.Identity()
        self.k_norm = _norm(norm_layer, self.head_dim, factory) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = _norm(norm_layer, dim, factory) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory) if projections else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Mix the values: q, k, v of (B, H, N, head_dim) to (B, H, N, head_dim)."""
        raise NotImplementedError

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same without masks, through the explicit N x N matrix: the truth that tests and reports compare with."""
        raise NotImplementedError

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over the tokens of ``x`` (B, N, dim); ``attn_mask`` is as in scaled_dot_product_attention."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self.attend(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal)
        return self.proj_drop(self.proj(self.norm(mixed.transpose(1, 2).reshape(B, N, self.dim))))


class LinearAttention(Attention):
    """Attention that never forms the N x N matrix; a subclass gives :meth:`mix` and :meth:`reference`.

    Arguments are those of :class:`Attention`.

    Raises:
        UnsupportedError: ``attn_drop`` is not 0, or forward is given a mask or ``is_causal``.
    """

    def __init__(self, dim: int, num_heads: int = 8, *args: Any, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, *args, **kwargs)
        if self.attn_drop.p:
            raise UnsupportedError(
                f"{type(self).__name__}: attn_drop={self.attn_drop.p} drops entries of an N x N matrix that linear "
                "attention never forms; leave it at 0 and use proj_drop"
            )

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values over all tokens: q, k, v of (B, H, N, head_dim) to (B, H, N, head_dim)."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UnsupportedError("this mechanism attends over all tokens; it accepts attn_mask=None, is_causal=False")
        return self.mix(q, k, v)


def _norm(norm_layer: type[nn.Module] | None, width: int, factory: dict[str, Any]) -> nn.Module:
    if norm_layer is None:
        raise ConfigError("qk_norm and scale_norm need norm_layer, a constructor such as torch.nn.LayerNorm")
    return norm_layer(width, **factory)
