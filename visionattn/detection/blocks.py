"""Blocks for Ultralytics' model yaml.

The parser assumes that a foreign block keeps the number of channels. ``LAT`` does; ``LATFeatures`` returns a list, from
which ``Index`` rows pick.
"""

from collections.abc import Sequence

import timm
from torch import Tensor, nn
from ultralytics.nn.modules import Conv

from visionattn.attention import ATTENTION
from visionattn.errors import ConfigError, UnknownNameError, suggest


class LAT(nn.Module):
    """Linear-attention transformer block over a feature map: (B, C, H, W) to (B, C, H, W), any H and W.

    Every token of the map attends to every other one; a depthwise convolution on the values, whose grid is the map's
    own, adds what lies near. Then a pointwise two-layer perceptron. Both parts are residual. All projections are
    convolutions with batch normalisation, so Ultralytics' ``fuse()`` folds every normalisation away.

    Args:
        c: channels C of input and output.
        head_dim: channels of a head; must divide ``c``.
        attention: a name in :data:`visionattn.attention.ATTENTION`.
        mlp_ratio: hidden width of the perceptron over ``c``.
        kernel_size: side of the depthwise convolution.

    Raises:
        ConfigError: ``head_dim`` does not divide ``c``.
        UnknownNameError: no such attention.
    """

    def __init__(
        self, c: int, head_dim: int = 32, attention: str = "ela_hadamard", mlp_ratio: float = 2.0, kernel_size: int = 5
    ) -> None:
        super().__init__()
        if c % head_dim:
            raise ConfigError(f"LAT: c={c} is not divisible by head_dim={head_dim}; choose a head_dim that divides it")
        hidden = int(c * mlp_ratio)
        self.attention = ATTENTION[attention](c, c // head_dim, projections=False)
        self.qkv = Conv(c, self.attention.streams * c, 1, act=False)
        self.local = Conv(c, c, kernel_size, g=c, act=False)
        self.proj = Conv(c, c, 1, act=False)
        self.mlp = nn.Sequential(Conv(c, hidden, 1), Conv(hidden, c, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        _, C, H, W = x.shape
        qkv = self.qkv(x)
        mixed = self.attention(qkv.flatten(2).transpose(1, 2), grid=(H, W)).transpose(1, 2).unflatten(2, (H, W))
        x = x + self.proj(mixed + self.local(qkv[:, -C:]))
        return x + self.mlp(x)


class LATFeatures(nn.Module):
    """A hierarchical timm backbone, as the first row of a yaml: (B, 3, H, W) to the list of its maps.

    Ultralytics' ``Index`` rows then pick the maps; their channels are literal, since the parser cannot know them::

        backbone:
          - [-1, 1, LATFeatures, [lat_nano]]
          - [0, 1, Index, [64, 0]] # stride 8
          - [0, 1, Index, [128, 1]] # stride 16
          - [0, 1, Index, [256, 2]] # stride 32

    Args:
        name: a model of timm with ``features_only``, such as ``lat_nano``.
        indices: the maps to return; by default those of strides 8, 16 and 32 of a ``lat``.

    Raises:
        UnknownNameError: timm has no such model.
    """

    def __init__(self, name: str, indices: Sequence[int] = (1, 2, 3)) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise UnknownNameError(f"LATFeatures: unknown model {name!r}; {suggest(name, timm.list_models('lat_*'))}")
        self.backbone = timm.create_model(name, features_only=True, out_indices=tuple(indices))

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.backbone(x)
