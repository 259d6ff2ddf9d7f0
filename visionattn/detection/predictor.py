"""Ultralytics' detection predictor with its suppression of overlapping boxes made exact."""

from typing import Any, ClassVar

import torch
from ultralytics.models.yolo.detect import DetectionPredictor
from ultralytics.utils import nms


class ExactPredictor(DetectionPredictor):
    """Finds the same boxes however busy the machine is: the stock one drops the rest of a batch after a time limit."""

    multi_label: ClassVar[bool] = False

    def postprocess(self, preds: Any, img: torch.Tensor, orig_imgs: list[Any], **kwargs: Any) -> list[Any]:
        """Turn raw predictions into Ultralytics' results, one an image."""
        boxes = nms.non_max_suppression(
            preds,
            self.args.conf,
            self.args.iou,
            self.args.classes,
            self.args.agnostic_nms,
            multi_label=self.multi_label,
            max_det=self.args.max_det,
            end2end=getattr(self.model, "end2end", False),
            max_time_img=float("inf"),
        )
        results: list[Any] = self.construct_results(boxes, img, orig_imgs, **kwargs)
        return results


class ScoringPredictor(ExactPredictor):
    """Gives a box every class that reaches the threshold, not only its best one, as scoring by COCO's AP wants it."""

    multi_label = True
