"""YOLO labels in COCO's JSON form, for COCO's evaluation."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionattn.atomic import write_text
from visionattn.data.labels import label_path, read_labels
from visionattn.pictures import image_size

if TYPE_CHECKING:
    from visionattn.data.detection import DetectionData


def coco_ground_truth(data: "DetectionData", split: str) -> dict[str, Any]:
    """Return the annotations of a split in COCO's form, images without objects included.

    Image ids count from 1 in the order of ``data.images[split]``, category ids are class index + 1, and ``file_name``
    is the image's absolute path.

    Raises:
        DataError: an image cannot be read or a label line is malformed.
    """
    return coco_form(
        data.names,
        ((str(path), image_size(path), read_labels(label_path(path), len(data.names))) for path in data.images[split]),
    )


def coco_form(
    names: Mapping[int, str], records: Iterable[tuple[str, tuple[int, int], NDArray[np.float64]]]
) -> dict[str, Any]:
    """Build COCO's form from records (file name, (width, height), YOLO labels (N, 5))."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (file_name, (width, height), labels) in enumerate(records, 1):
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for index, x, y, w, h in labels * (1, width, height, width, height):
            box = [float(value) for value in (x - w / 2, y - h / 2, w, h)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(index) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index + 1, "name": name} for index, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(ground_truth: dict[str, Any], path: Path) -> None:
    """Write COCO's form as JSON."""
    write_text(path, json.dumps(ground_truth))
