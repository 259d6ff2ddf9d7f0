"""Hierarchical vision transformers with linear attention: ``lat_{nano,tiny,small,base}``.

Four stages at strides 4, 8, 16 and 32, any image size, and feature maps for detection and segmentation:

    timm.create_model("lat_tiny", features_only=True)(torch.randn(1, 3, 480, 640))
"""

# mypy: disable-error-code="untyped-decorator"
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm,
    LayerNorm2d,
    Mlp,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visionattn.attention import Attention, attention_layer
from visionattn.errors import ConfigError


class LatBlock(nn.Module):
    """Position encoding, attention and perceptron, each residual: (B, C, H, W) to the same, any H and W.

    Positions are told by a depthwise convolution with zero padding (conditional position encoding, arXiv 2102.10882),
    so there is no table of a fixed size. Normalisations are layer norms, not batch norms: they compute the same in
    training and evaluation, at any batch size and under recomputation. Tokens keep their channels together, which read
    as a map is PyTorch's channels-last layout: only the first block of a stage copies, if its map is not in it.

    Args:
        dim: channels C.
        head_dim: channels of a head; must divide ``dim``.
        attn_layer: a name or class in :data:`visionattn.attention.ATTENTION`, or of ``attention_layer``.
        local: side of the depthwise convolution on the attention's values, 0 for none.
        mlp_ratio: hidden width of the perceptron over ``dim``.
        drop_path: probability of leaving out the attention or the perceptron for an image of the batch.
        device: where parameters are made.
        dtype: their type.

    Raises:
        ConfigError: ``head_dim`` does not divide ``dim``.
        UnknownNameError: no such attention.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 32,
        attn_layer: str | type[Attention] = "ela_hadamard",
        local: int = 3,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % head_dim:
            raise ConfigError(f"lat: head_dim={head_dim} does not divide the width {dim}; choose one that divides it")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.norm1 = LayerNorm(dim, **factory)
        layer = attention_layer(attn_layer, local=local)
        self.attn = layer(dim, dim // head_dim, qkv_bias=True, **factory)
        self.norm2 = LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        x = (x + self.position(x)).flatten(2).transpose(1, 2).contiguous()
        x = x + self.drop_path(self.attn(self.norm1(x), grid=(H, W)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.transpose(1, 2).reshape(B, C, H, W)


class LatStage(nn.Module):
    """Blocks, after a convolution that halves the sides if ``stride`` is 2."""

    def __init__(self, width_in: int, width: int, stride: int, blocks: Sequence[nn.Module], factory: Any) -> None:
        super().__init__()
        self.downsample = _convolution(width_in, width, factory) if stride > 1 else nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Lat(nn.Module):
    """A pyramid of attention blocks, (B, 3, H, W) to maps of strides 4 to 32 and to logits (B, classes).

    Args:
        widths: channels of the four stages; ``head_dim`` must divide them.
        depths: blocks of the four stages.
        attn_layer: mechanism of all stages, or of each of the four; see :class:`LatBlock`.
        head_dim: channels of a head.
        mlp_ratio: hidden width of a perceptron over the width.
        local: side of the depthwise convolution on the attention's values, 0 for none.
        num_classes: outputs of the classifier, 0 for none.
        in_chans: channels of the image.
        global_pool: how the last map is pooled, as timm names it; empty for not at all.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        device: where parameters are made.
        dtype: their type.

    Raises:
        ConfigError: not four mechanisms, or a width that ``head_dim`` does not divide.
        UnknownNameError: no such attention.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (2, 2, 6, 2),
        attn_layer: str | type[Attention] | Sequence[str | type[Attention]] = "ela_hadamard",
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        local: int = 3,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layers = [attn_layer] * len(widths) if isinstance(attn_layer, str | type) else list(attn_layer)
        if len(layers) != len(widths):
            raise ConfigError(
                f"attn_layer: got {len(layers)} names, accepted: one, or one for each of {len(widths)} stages"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans = num_classes, in_chans
        self.stem = nn.Sequential(
            _convolution(in_chans, widths[0] // 2, factory), nn.GELU(), _convolution(widths[0] // 2, widths[0], factory)
        )
        drops = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.Sequential()
        self.feature_info = []
        for i, width in enumerate(widths):
            blocks = [LatBlock(width, head_dim, layers[i], local, mlp_ratio, drop, **factory) for drop in drops[i]]
            self.stages.append(LatStage(widths[max(i - 1, 0)], width, 2 if i else 1, blocks, factory))
            self.feature_info.append({"num_chs": width, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.num_features = widths[-1]
        self.norm = LayerNorm2d(self.num_features, **factory)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **factory)
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights anew; ``needs_reset`` is False where modules have just drawn theirs."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if needs_reset and reset is not None:
                reset()
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the normalised map of the last stage, (B, C, H / 32, W / 32)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map and classify it, or only pool it."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last map and the maps after the stages of ``indices``.

        Args:
            x: images.
            indices: stages; the last ones if an int, all if None.
            norm: normalise the map of the last stage.
            stop_early: compute no stage that is not asked for.
            output_fmt: ``NCHW``.
            intermediates_only: leave the last map out.
        """
        assert output_fmt == "NCHW", "lat: output_fmt must be NCHW"
        take, last = feature_take_indices(len(self.stages), indices)
        final = len(self.stages) - 1
        stages = self.stages
        if not torch.jit.is_scripting() and stop_early:  # type: ignore[attr-defined]
            stages = stages[: last + 1]
        x = self.stem(x)
        maps: list[Tensor] = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                maps.append(self.norm(x) if norm and i == final else x)
        if intermediates_only:
            return maps
        return self.norm(x) if len(stages) > final else x, maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of ``indices`` do not need, and return those indices, counted from the first stage."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()  # it is as wide as the last stage was
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, and the pooling if one is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping what they computed."""
        for module in self.modules():
            if isinstance(module, LatStage):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that sort the parameters into layers, from input to output."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters to spare, besides biases and normalisations: none."""
        return set()


def _convolution(width_in: int, width: int, factory: dict[str, Any]) -> nn.Sequential:
    """Halve the sides, rounding up. The normalisation folds into the convolution when the model is exported."""
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False, **factory), nn.BatchNorm2d(width, **factory)
    )


_CFG = {"pool_size": (7, 7), "first_conv": "stem.0.0", "classifier": "head.fc", "license": "agpl-3.0"}
default_cfgs = generate_default_cfgs({f"lat_{size}.untrained": _CFG for size in ("nano", "tiny", "small", "base")})


def _create(variant: str, pretrained: bool, **options: Any) -> Lat:
    features = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(Lat, variant, pretrained, feature_cfg=features, **options)


@register_model
def lat_nano(pretrained: bool = False, **options: Any) -> Lat:
    """3.6 M parameters, 0.6 G multiplications at 224 pixels."""
    size = {"widths": (32, 64, 128, 256), "depths": (2, 2, 6, 2)}
    return _create("lat_nano", pretrained, **size | options)


@register_model
def lat_tiny(pretrained: bool = False, **options: Any) -> Lat:
    """8.7 M parameters, 1.3 G multiplications at 224 pixels."""
    size = {"widths": (32, 96, 192, 384), "depths": (2, 2, 8, 2)}
    return _create("lat_tiny", pretrained, **size | options)


@register_model
def lat_small(pretrained: bool = False, **options: Any) -> Lat:
    """25 M parameters, 3.8 G multiplications at 224 pixels."""
    size = {"widths": (64, 128, 256, 512), "depths": (3, 3, 12, 4)}
    return _create("lat_small", pretrained, **size | options)


@register_model
def lat_base(pretrained: bool = False, **options: Any) -> Lat:
    """56 M parameters, 9.8 G multiplications at 224 pixels."""
    size = {"widths": (96, 192, 384, 768), "depths": (3, 4, 16, 3)}
    return _create("lat_base", pretrained, **size | options)
