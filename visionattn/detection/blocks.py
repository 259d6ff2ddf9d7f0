"""Blocks for Ultralytics' model yaml.

The parser assumes that a foreign block keeps the number of channels. ``LAT`` and ``Rep`` do; ``LATFeatures`` returns a
list, from which ``Index`` rows pick; ``LinearDetect`` passes for Ultralytics' own head.
"""

import copy
from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Conv, Detect, RepConv

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
        attention: a name in :data:`visionattn.attention.ATTENTION`; None: none, for the convolution on its own.
        mlp_ratio: hidden width of the perceptron over ``c``; 0: no perceptron.
        kernel_size: side of the depthwise convolution; 0: no convolution.

    Raises:
        ConfigError: ``head_dim`` does not divide ``c``, there is neither attention nor convolution, or, in ``forward``,
            the map has not ``c`` channels.
        UnknownNameError: no such attention.
    """

    def __init__(
        self,
        c: int,
        head_dim: int = 32,
        attention: str | None = "ela_hadamard",
        mlp_ratio: float = 2.0,
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        if c % head_dim:
            raise ConfigError(f"LAT: c={c} is not divisible by head_dim={head_dim}; choose a head_dim that divides it")
        if attention is None and not kernel_size:
            raise ConfigError("LAT: got neither attention nor kernel_size; give one or both")
        hidden = int(c * mlp_ratio)
        self.attention = None if attention is None else ATTENTION[attention](c, c // head_dim, projections=False)
        self.qkv = Conv(c, c if self.attention is None else self.attention.streams * c, 1, act=False)
        self.local = Conv(c, c, kernel_size, g=c, act=False) if kernel_size else None
        self.proj = Conv(c, c, 1, act=False)
        self.mlp = nn.Sequential(Conv(c, hidden, 1), Conv(hidden, c, 1, act=False)) if hidden else None

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check(x)
        x = x + self.proj(self._mix(self.qkv(x), x.shape[1]))
        return x if self.mlp is None else x + self.mlp(x)

    def _check(self, x: Tensor) -> None:
        c = self.qkv.conv.in_channels
        if not torch.jit.is_tracing() and x.shape[1] != c:  # type: ignore[no-untyped-call, attr-defined]
            raise ConfigError(f"LAT: got c={c} for a map of {x.shape[1]} channels; write c={x.shape[1]}")

    def _mix(self, qkv: Tensor, channels: int) -> Tensor:
        values = qkv[:, -channels:]
        if self.attention is None:
            assert self.local is not None
            return self.local(values)
        H, W = qkv.shape[2], qkv.shape[3]
        mixed = self.attention(qkv.flatten(2).transpose(1, 2), grid=(H, W)).transpose(1, 2).unflatten(2, (H, W))
        return mixed if self.local is None else mixed + self.local(values)


class Rep(RepConv):
    """3x3 convolution of C channels that is trained as three branches, 3x3, 1x1 and identity, each with its own norm.

    ``fuse()`` makes one convolution of them: RepVGG, Ding et al. 2021 (arXiv 2101.03697), section 3.

    Args:
        c: channels of input and output.
    """

    def __init__(self, c: int) -> None:
        super().__init__(c, c, act=Conv.default_act, bn=True)


class PredictionConv(nn.Conv2d):
    """A last convolution of a head's branch that is its first, too.

    When Ultralytics loads weights, it asks the first block of each branch for the convolution inside.
    """

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution itself."""
        return self


class _AsDetect(type):
    """Makes a class equal to Ultralytics' ``Detect``, by which its parser knows what a head is to be given."""

    def __eq__(cls, other: object) -> bool:
        return other is Detect or type.__eq__(cls, other)

    def __hash__(cls) -> int:
        return hash(Detect)


class LinearDetect(Detect, metaclass=_AsDetect):
    """Head of one 1x1 convolution a map and branch; what comes before stands in the yaml, for boxes and classes alike.

    Losses, assignment and decoding are Ultralytics'. Outputs are those of ``Detect``. Scores of the NMS-free branch
    are Ultralytics' own, too, with a depthwise 3x3 and a 1x1 convolution twice before the last: they are to tell which
    one of the places that see an object keeps it, and their loss does not teach the maps.

    Args:
        nc: number of classes.
        reg_max: bins of a box side's distribution; 1: sides themselves.
        end2end: have an NMS-free branch, too.
        ch: channels of the maps, finest first.
    """

    def __init__(self, nc: int = 80, reg_max: int = 1, end2end: bool = False, ch: Sequence[int] = ()) -> None:
        super().__init__(nc, reg_max, end2end, ch)
        self.cv2 = nn.ModuleList(nn.Sequential(PredictionConv(c, 4 * reg_max, 1)) for c in ch)
        self.cv3 = nn.ModuleList(nn.Sequential(PredictionConv(c, nc, 1)) for c in ch)
        if end2end:
            self.one2one_cv2 = copy.deepcopy(self.cv2)


def has_nms_free_branch(head: object) -> bool:
    """Tell whether a head has an NMS-free branch, which is not so if fusing has removed it."""
    return getattr(head, "one2one_cv2", None) is not None


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
