"""Suppression of overlapping boxes inside the graph, for any batch and any number of anchors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from visionattn.errors import ConfigError


@dataclass(frozen=True)
class Thresholds:
    """Of an embedded suppression, fixed in the file.

    Attributes:
        conf: boxes of a lower score are left out. For AP it must be next to nothing; 0.25 is for demonstrations.
        iou: boxes of a class that overlap a better one by more are left out.
        max_det: most boxes of an image.

    Raises:
        ConfigError: a number is out of range.
    """

    conf: float = 0.001
    iou: float = 0.7
    max_det: int = 300

    def __post_init__(self) -> None:
        if not 0 <= self.conf <= 1 or not 0 <= self.iou <= 1 or self.max_det < 1:
            raise ConfigError(
                f"got conf {self.conf}, iou {self.iou}, max_det {self.max_det}; expected 0..1, 0..1, 1 or more"
            )


class EmbeddedNMS(nn.Module):
    """A detector's network followed by the suppression of overlapping boxes, class by class.

    (B, 3, H, W) to (B, ``max_det``, 6): x1, y1, x2, y2, score, class; best first, filled up with zeros. A box may
    appear with several classes, as scoring by COCO's AP wants it.

    Args:
        network: gives raw predictions (B, 4 + classes, anchors).
        thresholds: fixed in the graph.
    """

    def __init__(self, network: nn.Module, thresholds: Thresholds) -> None:
        super().__init__()
        self.network, self.thresholds = network, thresholds

    def forward(self, images: Tensor) -> Tensor:
        raw = self.network(images)
        centre, extent, scores = raw[:, :2], raw[:, 2:4], raw[:, 4:]
        boxes = torch.cat((centre - extent / 2, centre + extent / 2), 1).transpose(1, 2)
        kept = scores * torch.ops.visionattn.survivors(boxes, scores, self.thresholds.conf, self.thresholds.iou)
        # There may be fewer scores than boxes asked for. Classes lie innermost, since their number is known.
        padded = nn.functional.pad(kept.transpose(1, 2), [0, 0, 0, self.thresholds.max_det])
        best, index = padded.flatten(1).topk(self.thresholds.max_det)
        place = (index // scores.shape[1]).clamp(max=boxes.shape[1] - 1)
        label = (index % scores.shape[1]).to(best.dtype)
        chosen = boxes.gather(1, place.unsqueeze(-1).expand(-1, -1, 4))
        return torch.cat((chosen, best.unsqueeze(-1), label.unsqueeze(-1)), -1) * (best > 0).unsqueeze(-1)


@torch.library.custom_op("visionattn::survivors", mutates_args=())
def survivors(boxes: Tensor, scores: Tensor, conf: float, iou: float) -> Tensor:
    """Return 1 where a score survives, 0 elsewhere, as ONNX's NonMaxSuppression defines it.

    Args:
        boxes: (B, anchors, 4), x1, y1, x2, y2.
        scores: (B, classes, anchors).
        conf: scores must be higher.
        iou: so that no better box of the class overlaps by more.
    """
    kept = torch.zeros_like(scores)
    for image, (own, values) in enumerate(zip(boxes, scores, strict=True)):
        label, place = (values > conf).nonzero(as_tuple=True)
        found = batched_nms(own[place].float(), values[label, place].float(), label, iou)
        kept[image, label[found], place[found]] = 1
    return kept


@survivors.register_fake
def _(boxes: Tensor, scores: Tensor, conf: float, iou: float) -> Tensor:
    return torch.empty_like(scores)


def onnx_translation() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how :func:`survivors` reads in ONNX, for the exporter's table of translations."""
    import onnxscript

    op: Any = onnxscript.opset18

    def translated(boxes: Any, scores: Any, conf: float, iou: float) -> Any:
        most = op.Reshape(op.Shape(scores, start=2, end=3), op.Constant(value_ints=[1]))
        found = op.NonMaxSuppression(
            boxes, scores, most, op.Constant(value_floats=[iou]), op.Constant(value_floats=[conf])
        )
        nothing = op.Mul(scores, op.Constant(value_float=0.0))
        ones = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(found, start=0, end=1))
        return op.ScatterND(nothing, found, ones)

    return {torch.ops.visionattn.survivors.default: translated}
