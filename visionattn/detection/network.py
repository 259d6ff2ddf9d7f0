"""A detector as a plain network for a runtime: batch normalisation folded, images in, one tensor out."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Detect

from visionattn.choices import NMS
from visionattn.detection.blocks import has_nms_free_branch
from visionattn.detection.model import YOLOLAT
from visionattn.detection.peaks import PeakHead
from visionattn.errors import UnsupportedError


class DetectionNetwork(nn.Module):
    """Float32 images (B, 3, H, W), RGB in 0..1, to raw predictions.

    With ``nms="none"`` these are (B, 4 + classes, anchors): box centre, width and height in pixels, then a score a
    class. With ``nms="free"`` they are the (B, 300, 6) of an NMS-free head: x1, y1, x2, y2, score, class;
    with ``nms="peaks"`` those of both its branches, see :class:`~visionattn.detection.peaks.PeakHead`.

    In half precision everything is, but the decoding of boxes and scores: 16 bits tell coordinates above 1024 pixels
    apart only by whole ones.

    Args:
        detector: what to run; it is copied.
        nms: ``none``, ``free`` or ``peaks``.
        half: run in float16.

    Raises:
        UnsupportedError: ``free`` or ``peaks`` is asked of a head without an NMS-free branch, or ``peaks`` of one
            that :class:`~visionattn.detection.peaks.PeakHead` refuses.
    """

    def __init__(self, detector: YOLOLAT, nms: NMS = "none", half: bool = False) -> None:
        super().__init__()
        model: Any = copy.deepcopy(detector.model).float().eval()
        head = model.model[-1]
        free = nms in ("free", "peaks")
        if free and not has_nms_free_branch(head):
            raise UnsupportedError(
                f"nms={nms}: this detector has no NMS-free head (end2end: true in its yaml); use none"
            )
        head.end2end = free
        if nms == "peaks":
            model.model[-1] = PeakHead(head)
        self.model = model.fuse(verbose=False).requires_grad_(False)
        head.export, head.dynamic = True, True
        self.half_precision = half
        if half:
            self.model.half()
            head.dfl.float()
            last = [*(head.one2one if free else head.one2many).values()]
            for branches in [*last, model.model[-1].many] if nms == "peaks" else last:
                for index, branch in enumerate(branches):
                    branches[index] = nn.Sequential(*branch, _Widen())

    def settle(self) -> None:
        """Keep the anchors of the last input's size, as a CUDA graph needs; another size makes others."""
        for module in self.modules():
            if isinstance(module, Detect):
                module.dynamic = False

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.half() if self.half_precision else images)


class _Widen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def classes_and_size(detector: YOLOLAT) -> tuple[dict[int, str], int, int]:
    """Return class names by index, the side in pixels that it was trained at, and its stride."""
    names: dict[int, str] = dict(detector.names)
    model: Any = detector.model
    return names, int(detector.overrides.get("imgsz", 640)), int(torch.as_tensor(model.stride).max())
