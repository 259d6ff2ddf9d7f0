"""ELA's Hyper-Link layer and its Memory Lobe (arXiv 2605.18848, sections 5.2 and 5.3)."""

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.attention import ATTENTION
from visionattn.blocks.prenorm import PreNormBlock
from visionattn.errors import ConfigError, UnsupportedError


class HyperLinkBlock(PreNormBlock):
    """``X_k = X_{k-1} + FFN(Attn(Norm(X_{k-1})))``: one norm and one residual around the whole layer (section 5.2).

    timm's block without ``norm2``, ``ls1`` and ``drop_path1``; the names of the rest are the same. Layer scale and
    stochastic depth act on all that is added to the residual stream. The paper also leaves out the norm after the last
    layer, except in large trainings: ``final_norm=False`` in timm's models.

    The authors' code computes something else than their paper: its FFN adds its own input, so that the output of the
    attention reaches the residual stream as well. That is ``ffn_residual=True``.

    Options reach a timm model through ``block_fn=visionattn.block_layer("HyperLinkBlock", memory=True)``.

    Args:
        *args: those of timm's block, as are ``**kwargs``.
        memory: add a :class:`MemoryLobe` over the output F of the FFN: ``X_k = X_{k-1} + F + Lobe(F)`` (section 5.3).
        causal_memory: the lobe is causal, as language models need it.
        ffn_residual: the form of the authors' code, ``F = h + FFN(h)`` with ``h = Attn(Norm(X_{k-1}))``.
        device: where parameters are made.
        dtype: their type.

    Raises:
        UnknownNameError: no such attention.
        ConfigError: ``causal_memory`` without ``memory``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *args: Any,
        memory: bool = False,
        causal_memory: bool = False,
        ffn_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if causal_memory and not memory:
            raise ConfigError("causal_memory=True without a memory; set memory=True too")
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        del self.norm2, self.ls1, self.drop_path1
        self.memory = MemoryLobe(dim, causal=causal_memory, device=device, dtype=dtype) if memory else None
        self.ffn_residual = ffn_residual

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Map tokens (B, N, dim) to (B, N, dim); the arguments are those of :class:`visionattn.attention.Attention`.

        Raises:
            UnsupportedError: ``is_causal`` with a lobe that is not causal, or with an attention that cannot be.
        """
        mixed = self.attend(x, attn_mask, is_causal, grid)
        added = self.mlp(mixed)
        if self.ffn_residual:
            added = mixed + added
        if self.memory is not None:
            added = added + self.memory(added, attn_mask, is_causal)
        return x + self.drop_path2(self.ls2(added))


class MemoryLobe(nn.Module):
    """What a layer added to the residual stream, attended over by one head of the full width (section 5.3).

    ``Hadamard(F Wq, F Wk, F Wv)``: the kernel of :class:`visionattn.attention.ElaHadamardAttention`; no bias, no output
    projection, no norm, no scale, 3 dim^2 parameters, O(N dim^2).

    The paper lets the lobe see all tokens in its language model too, where they include the one to be predicted; the
    sudden fall of the loss that it shows there, and not with a causal lobe, is what such a leak looks like. Here a lobe
    is bidirectional, for encoders, or causal.

    Args:
        dim: width of a token.
        causal: token i sees tokens 0..i, in every call.
        device: where parameters are made.
        dtype: their type.
    """

    def __init__(
        self,
        dim: int,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.attention = ATTENTION["ela_hadamard"](dim, 1, projections=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the lobe's output, (B, N, dim), for what a layer added, (B, N, dim).

        Args:
            x: what the layer added.
            attn_mask: boolean, True where a token takes part, broadcastable to (B, 1, 1, N).
            is_causal: the layer must not see tokens to come.

        Raises:
            UnsupportedError: ``is_causal`` is asked of a bidirectional lobe, or the mask differs from query to query.
        """
        if is_causal and not self.causal:
            raise UnsupportedError(
                "MemoryLobe: got is_causal=True, but this lobe is bidirectional and would read the target, the tokens "
                "to come; use a causal one (causal=True; causal_memory=True in HyperLinkBlock), or is_causal=False"
            )
        return self.attention(self.qkv(x), attn_mask, self.causal)
