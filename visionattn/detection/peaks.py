"""NMS-free boxes by both branches of a head: the scores of both, less where they are no peak of their maps."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.errors import UnsupportedError

SHARE = 0.75
"""Weight of the branch with NMS in the geometric mean of both scores."""

STEEPNESS = 32
"""Power of a score's share of the best one around it: steep, and yet rounding moves no score far."""

FLOOR = 0.1
"""Least factor of a score that is no peak, so that neighbours still come, after the peaks."""


class PeakHead(nn.Module):
    """An Ultralytics head with an NMS-free branch, as one that asks both branches and needs no NMS either.

    The branch with NMS tells objects better, the NMS-free one which of several places is to answer. A box has the
    NMS-free branch's sides and the geometric mean of both scores; where that is no maximum among its neighbours, on its
    own map (as in CenterNet: Zhou et al., Objects as Points, section 3) and at the same place of the others, it is
    scaled down.

    Args:
        head: an Ultralytics ``Detect`` with both branches; its maps halve in size, finest first.

    Raises:
        UnsupportedError: its maps do not, or fusing has removed the branch with NMS.
    """

    def __init__(self, head: Any) -> None:
        super().__init__()
        if head.cv3 is None:
            raise UnsupportedError("nms=peaks: fusing has removed the branch with NMS from these weights; use free")
        strides = head.stride.tolist()
        if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
            raise UnsupportedError(f"nms=peaks: got maps of strides {strides}, expected each twice the last; use free")
        self.many = head.cv3  # the head's own fuse() removes it there
        self.head = head
        self.f, self.i = head.f, head.i

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return boxes (B, 300, 6), or fewer where there are fewer places: x1, y1, x2, y2, score, class."""
        head = self.head
        sides = torch.cat([branch(x).flatten(2) for branch, x in zip(head.one2one_cv2, maps, strict=True)], dim=2)
        scores = [  # logarithms; logsigmoid is exported as log(sigmoid), which runtimes round to log(0)
            -SHARE * F.softplus(-many(x)) - (1 - SHARE) * F.softplus(-one(x))
            for many, one, x in zip(self.many, head.one2one_cv3, maps, strict=True)
        ]
        boxes = head._get_decode_boxes({"boxes": sides, "feats": maps})
        flat = torch.cat([level.flatten(2) for level in damped(scores)], dim=2).exp()
        return head.postprocess(torch.cat((boxes, flat), dim=1).transpose(1, 2))


def damped(scores: list[Tensor]) -> list[Tensor]:
    """Lower the scores that a neighbour exceeds.

    Args:
        scores: maps (B, classes, H, W) of logarithms of scores, finest first, each half as high and wide as the one
            before.

    Returns:
        Maps of the same shapes: logarithms of the scores, times :data:`FLOOR` at least.
    """
    around = [F.max_pool2d(level, 3, 1, 1) for level in scores]
    best = [torch.stack([_at(other, j - i) for j, other in enumerate(around)]).amax(0) for i in range(len(around))]
    return [
        level + (STEEPNESS * (level - most)).clamp(min=math.log(FLOOR))
        for level, most in zip(scores, best, strict=True)
    ]


def _at(level: Tensor, halvings: int) -> Tensor:
    """Bring a map to a grid that is finer by so many halvings, or coarser if they are negative."""
    if halvings > 0:
        return F.interpolate(level, scale_factor=float(2**halvings))
    return F.max_pool2d(level, 2**-halvings) if halvings else level
