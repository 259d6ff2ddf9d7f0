"""Flat vision transformers whose blocks know the grid: ``vit_lat_{tiny,small,base}_patch16_224``.

The sizes of ViT-Ti, ViT-S and ViT-B, linear attention, mean pooling. Any image whose sides are multiples of the patch:

    timm.create_model("vit_lat_small_patch16_224", num_classes=10)(torch.randn(1, 3, 224, 320))
"""

# mypy: disable-error-code="untyped-decorator"
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from visionattn.attention import ATTENTION, Attention, attention_layer
from visionattn.blocks import PreNormBlock
from visionattn.errors import ConfigError

_FIXED = {"dynamic_img_size": True, "patch_drop_rate": 0.0}


class VitLat(VisionTransformer):
    """timm's vision transformer with one change: every block gets the grid (H, W) of the patches, in every call.

    The grid is read off the embedded image and handed on as an argument. Nothing is to be set for an image of another
    size, and rectangles, prefix tokens and exports with dynamic sizes are ordinary inputs.

    The depthwise convolution on the values also tells positions, by its zero padding, as the locally-enhanced position
    encoding of CSWin (arXiv 2107.00652) does. So there is no table to interpolate, unless ``pos_embed="learn"`` asks
    for timm's. A side of 3 costs 9 multiplications a token and channel, 0.4 % of a block of ViT-Ti (side 5: 1.1 %);
    twelve in a row reach over 25 patches, more than the 14 of an image of 224 pixels.

    Args:
        attn_layer: a name in :data:`visionattn.attention.ATTENTION`, a class of ours, or whatever else timm takes;
            the latter has no convolution and may need ``pos_embed="learn"`` to see positions.
        local: side of the depthwise convolution on the values, 0 for none.
        block_fn: block whose ``forward`` takes ``grid``, such as those in :mod:`visionattn.blocks`.
        global_pool: as in timm, like all that follows and is not named here.
        class_token: add a class token.
        pos_embed: ``none``, or ``learn`` for a table that is interpolated to the grid of each image.
        **options: further arguments of timm's ``VisionTransformer``.

    Raises:
        ConfigError: ``patch_drop_rate``, which leaves no grid, or ``dynamic_img_size=False``.
        UnknownNameError: no such attention.
    """

    def __init__(
        self,
        *,
        attn_layer: str | type[nn.Module] = "ela_hadamard",
        local: int = 3,
        block_fn: type[nn.Module] = PreNormBlock,
        global_pool: str = "avg",
        class_token: bool = False,
        pos_embed: str = "none",
        **options: Any,
    ) -> None:
        for name, value in _FIXED.items():
            if options.setdefault(name, value) != value:
                raise ConfigError(f"vit_lat: got {name}={options[name]}, but its patches form a grid; leave it {value}")
        super().__init__(
            attn_layer=_with_convolution(attn_layer, local),
            block_fn=block_fn,
            global_pool=global_pool,
            class_token=class_token,
            pos_embed=pos_embed,
            **options,
        )

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map images (B, 3, H, W) to tokens (B, N, C), prefix tokens first."""
        x, grid = self._embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x = checkpoint(block, x, attn_mask, is_causal, grid)
            else:
                x = block(x, attn_mask, is_causal, grid)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Return the tokens after the last block and after each of the ``indices``; see timm's for the arguments."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt: got {output_fmt!r}, accepted: 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        taps = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            if self.grad_checkpointing:
                x = checkpoint(block, x, attn_mask, is_causal, grid)
            else:
                x = block(x, attn_mask, is_causal, grid)
            if index in take:
                taps.append(self.norm(x) if norm else x)
        prefix = [tap[:, : self.num_prefix_tokens] for tap in taps]
        taps = [tap[:, self.num_prefix_tokens :] for tap in taps]
        if output_fmt == "NCHW":
            taps = [tap.transpose(1, 2).unflatten(2, grid).contiguous() for tap in taps]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": taps}
            if with_prefix:
                found["image_intermediates_prefix"] = prefix
            return found if intermediates_only else found | {"image_features": self.norm(x)}
        result = list(zip(taps, prefix, strict=True)) if with_prefix else taps
        return result if intermediates_only else (self.norm(x), result)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        return self.norm_pre(self._pos_embed(x)), grid


def _with_convolution(layer: Any, side: int) -> Any:
    ours = layer in ATTENTION if isinstance(layer, str) else issubclass(layer, Attention)
    return attention_layer(layer, local=side) if ours else layer


_CFG = {"first_conv": "patch_embed.proj", "classifier": "head", "license": "agpl-3.0"}
default_cfgs = generate_default_cfgs({f"vit_lat_{s}_patch16_224.untrained": _CFG for s in ("tiny", "small", "base")})


def _create(variant: str, pretrained: bool, **options: Any) -> VitLat:
    return build_model_with_cfg(
        VitLat,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **options,
    )


@register_model
def vit_lat_tiny_patch16_224(pretrained: bool = False, **options: Any) -> VitLat:
    """5.7 M parameters."""
    size = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("vit_lat_tiny_patch16_224", pretrained, **size | options)


@register_model
def vit_lat_small_patch16_224(pretrained: bool = False, **options: Any) -> VitLat:
    """22 M parameters."""
    size = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("vit_lat_small_patch16_224", pretrained, **size | options)


@register_model
def vit_lat_base_patch16_224(pretrained: bool = False, **options: Any) -> VitLat:
    """87 M parameters."""
    size = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("vit_lat_base_patch16_224", pretrained, **size | options)
