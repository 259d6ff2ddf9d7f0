"""An independent check of the scoring: YOLOX-nano's published ONNX file on 328 genuine COCO images gives AP .287."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from visionattn.engine.coco import score

DATA = os.environ.get("VISIONATTN_DATA")
SIDE = 416


@pytest.mark.skipif(not DATA, reason="needs VISIONATTN_DATA with coco_mini_416 and yolox_nano")
def test_yolox_nano_scores_what_it_is_known_to_score():
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(
        Path(DATA) / "yolox_nano/yolox_nano.onnx", providers=["CPUExecutionProvider"]
    )
    ground_truth = json.loads(Path(DATA, "coco_mini_416/annotations/val2017.json").read_text())
    category_ids = sorted(category["id"] for category in ground_truth["categories"])  # 80 classes, ids 1 to 90
    predictions = []
    for image in ground_truth["images"]:
        pixels = cv2.imread(str(Path(DATA, "coco_mini_416/images/val2017", image["file_name"])))
        inputs, ratio = letterbox(pixels)
        boxes, values, classes = decode(session.run(None, {"images": inputs})[0][0])
        for (x1, y1, x2, y2), value, index in zip((boxes / ratio).tolist(), values.tolist(), classes, strict=True):
            predictions.append(
                {
                    "image_id": image["id"],
                    "category_id": category_ids[index],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": value,
                }
            )
    scores = score(ground_truth, predictions)
    print(scores)
    assert len(ground_truth["images"]) == 328
    assert scores.ap == pytest.approx(0.287, abs=0.003)
    assert scores.ap50 == pytest.approx(0.446, abs=0.003)


def letterbox(pixels):
    """Image at the top left of a 416 square of grey 114, BGR 0..255."""
    ratio = SIDE / max(pixels.shape[:2])
    height, width = (round(n * ratio) for n in pixels.shape[:2])
    canvas = np.full((SIDE, SIDE, 3), 114, np.float32)
    canvas[:height, :width] = cv2.resize(pixels, (width, height))
    return canvas.transpose(2, 0, 1)[None], ratio


def decode(output):
    """Raw (3549, 85) to boxes xyxy, scores, classes after class-wise NMS."""
    strides = np.concatenate([np.full((SIDE // s) ** 2, s) for s in (8, 16, 32)])[:, None]
    cells = np.concatenate(
        [np.stack(np.meshgrid(np.arange(SIDE // s), np.arange(SIDE // s)), -1).reshape(-1, 2) for s in (8, 16, 32)]
    )
    centre, size = (output[:, :2] + cells) * strides, np.exp(output[:, 2:4]) * strides
    confidence = output[:, 4:5] * output[:, 5:]
    anchors, classes = np.nonzero(confidence > 0.01)
    boxes = np.concatenate([centre - size / 2, centre + size / 2], 1)[anchors].astype(np.float32)
    values = confidence[anchors, classes]
    keep = batched_nms(torch.from_numpy(boxes), torch.from_numpy(values), torch.from_numpy(classes), 0.65).numpy()
    return boxes[keep], values[keep], classes[keep]
