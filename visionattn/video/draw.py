"""Drawing what a model found."""

from collections.abc import Mapping

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from visionattn.deployment import BGRImage, Detections

LEAST_TEXT_SCALE = 0.35
"""Smaller letters are not legible."""


def draw(image: BGRImage, result: Detections | NDArray[np.float32], names: Mapping[int, str]) -> BGRImage:
    """Return a copy of ``image`` with labelled boxes, or with the most probable class in its corner.

    Args:
        image: (H, W, 3), blue first.
        result: boxes, or probabilities of shape (C,).
        names: class index -> name.
    """
    size = (image.shape[1], image.shape[0])
    thickness = max(sv.calculate_optimal_line_thickness(size) // 2, 1)
    labeller = sv.LabelAnnotator(
        text_scale=max(sv.calculate_optimal_text_scale(size), LEAST_TEXT_SCALE),
        text_thickness=thickness,
        text_padding=2 + thickness,
        smart_position=True,
    )
    canvas = image.copy()
    if isinstance(result, Detections):
        found = sv.Detections(xyxy=result.boxes, confidence=result.scores, class_id=result.classes)
        canvas = sv.BoxAnnotator(thickness=2 * thickness).annotate(canvas, found)
    else:
        best = np.array([result.argmax()])
        found = sv.Detections(xyxy=np.array([[0, 0, *size]]), confidence=result[best], class_id=best)
    labels = [f"{names[index]} {score:.2f}" for _, _, score, index, *_ in found]
    return labeller.annotate(canvas, found, labels)
