"""Blocks for Ultralytics' model yaml. They keep the number of channels, which the parser assumes of a foreign block."""

from torch import Tensor, nn
from ultralytics.nn.modules import Conv

from visionattn.attention import ATTENTION
from visionattn.errors import ConfigError


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
        self.qkv = Conv(c, 3 * c, 1, act=False)
        self.attention = ATTENTION[attention](c, c // head_dim, projections=False)
        self.local = Conv(c, c, kernel_size, g=c, act=False)
        self.proj = Conv(c, c, 1, act=False)
        self.mlp = nn.Sequential(Conv(c, hidden, 1), Conv(hidden, c, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        _, C, H, W = x.shape
        qkv = self.qkv(x)
        mixed = self.attention(qkv.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (H, W))
        x = x + self.proj(mixed + self.local(qkv[:, 2 * C :]))
        return x + self.mlp(x)
