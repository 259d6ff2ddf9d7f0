"""From images to a detector's input and from its raw output to boxes: Ultralytics' own functions, for any runtime."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from ultralytics.data.augment import LetterBox
from ultralytics.utils import nms, ops

from visionattn.errors import WeightsError


def letterbox(images: Sequence[NDArray[np.uint8]], size: tuple[int, int], device: str) -> Tensor:
    """Fit images into the middle of a grey rectangle, with their proportions.

    Args:
        images: BGR arrays (H, W, 3) of any sizes.
        size: (H, W) of the rectangle in pixels.
        device: where the result is put.

    Returns:
        Float32 RGB in 0..1, (B, 3, H, W).
    """
    fitted = np.stack([LetterBox(size)(image=image) for image in images])
    return torch.from_numpy(fitted).to(device).permute(0, 3, 1, 2).flip(1).float() / 255


def check_form(raw: Tensor, finished: bool, classes: int) -> None:
    """Refuse a detector's output that is in none of the forms of :func:`suppress`, as RT-DETR's is.

    Args:
        raw: the output.
        finished: whether it holds boxes already.
        classes: how many there are.

    Raises:
        WeightsError: it has another shape.
    """
    if raw.dim() != 3 or (raw.shape[-1] != 6 if finished else raw.shape[1] != 4 + classes):
        expected = "(B, n, 6), finished boxes" if finished else f"(B, {4 + classes}, n), of {classes} classes"
        raise WeightsError(
            f"this detector gives an output of {tuple(raw.shape)}, expected {expected}; only outputs of the heads that "
            "Ultralytics calls Detect are read"
        )


def suppress(
    raw: Tensor, conf: float, iou: float, max_det: int, multi_label: bool, finished: bool = False
) -> list[Tensor]:
    """Turn raw predictions into boxes, best first; overlapping ones of a class are suppressed.

    It finds the same boxes however busy the machine is, where the stock call drops the rest of a batch after a limit of
    time.

    Args:
        raw: (B, 4 + classes, anchors): box centre, width, height and a score a class; or (B, n, 6), boxes already,
            which are not suppressed again.
        conf: boxes of a lower score are left out.
        iou: boxes of a class that overlap a better one by more are left out.
        max_det: most boxes of an image.
        multi_label: give a box every class that reaches the threshold, not only its best one, as scoring by COCO's AP
            wants it.
        finished: whether ``raw`` holds boxes already.

    Returns:
        For each image (n, 6): x1, y1, x2, y2, score, class.
    """
    found: list[Tensor] = nms.non_max_suppression(
        raw, conf, iou, multi_label=multi_label, max_det=max_det, max_time_img=float("inf"), end2end=finished
    )
    return [_best_class(boxes) for boxes in found] if finished and not multi_label else found


def _best_class(boxes: Tensor) -> Tensor:
    """Keep the first of those rows (n, 6) whose boxes are the same to the bit: its best class."""
    same = (boxes[:, None, :4] == boxes[None, :, :4]).all(-1)
    return boxes[~same.tril(-1).any(1)]


def in_image(boxes: Tensor, size: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Bring boxes (n, 4) from a letterboxed rectangle of ``size`` back into an image of ``shape`` (H, W, ...)."""
    moved: Tensor = ops.scale_boxes(size, boxes.clone(), shape)
    return moved
