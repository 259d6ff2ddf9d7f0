"""Convolutions whose bias and ReLU cuDNN adds itself: one pass over a feature map in place of three."""

from typing import Any

import torch
from torch import Tensor, nn


class ConvReLU(nn.Module):
    """A convolution and the ReLU after it, on a CUDA GPU, without gradients.

    Args:
        conv: with its bias, and padding by numbers.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.padding: Any = conv.padding

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        return torch.cudnn_convolution_relu(
            x, conv.weight, conv.bias, conv.stride, self.padding, conv.dilation, conv.groups
        )


def join_relus(module: nn.Module) -> None:
    """Replace blocks that are a convolution ``conv`` and an activation ``act``, if that is a ReLU, in place.

    Blocks that still have a normalisation between the two stay as they are.
    """
    for name, child in list(module.named_children()):
        block: Any = child
        if _is_conv_relu(child):
            joined = ConvReLU(block.conv)
            for attribute in ("i", "f", "type", "np"):  # where Ultralytics' forward finds its inputs
                if hasattr(block, attribute):
                    setattr(joined, attribute, getattr(block, attribute))
            setattr(module, name, joined)
        else:
            join_relus(child)


def _is_conv_relu(block: nn.Module) -> bool:
    conv = getattr(block, "conv", None)
    return (
        {name for name, _ in block.named_children()} == {"conv", "act"}
        and isinstance(conv, nn.Conv2d)
        and isinstance(getattr(block, "act", None), nn.ReLU)
        and conv.bias is not None
        and not isinstance(conv.padding, str)
    )
