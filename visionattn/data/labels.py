"""YOLO label files: one line ``class x y width height`` an object, in fractions of the image."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionattn.errors import DataError

TOLERANCE = 0.01
"""How far a coordinate may lie outside 0..1, as a fraction of the image: rounding. Ultralytics allows the same."""


def label_path(image: Path) -> Path:
    """Return where the labels of ``image`` are: the last folder ``images`` becomes ``labels``, the suffix ``.txt``."""
    images, labels = (f"{os.sep}{name}{os.sep}" for name in ("images", "labels"))
    return Path(labels.join(str(image).rsplit(images, 1))).with_suffix(".txt")


def read_labels(path: Path, classes: int) -> NDArray[np.float64]:
    """Read and check a label file; lines whose numbers are equal in single precision count once, as in training.

    Args:
        path: label file; a missing or empty one means an image without objects.
        classes: number of classes of the data set.

    Returns:
        Array (N, 5) of class, centre x, centre y, width, height, in fractions of the image. A polygon (a class and
        three or more xy pairs) is turned into its bounding box.

    Raises:
        DataError: a line is malformed; the message names file, line number and text.
    """
    if not path.is_file():
        return np.zeros((0, 5))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as text ({error})") from error
    rows: dict[tuple[float, ...], tuple[float, ...]] = {}
    widths = set()
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        try:
            row = _parse(fields, classes)
            rows.setdefault(tuple(np.array(fields, np.float32).tolist()), row)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}; the line is: {line.strip()[:100]}") from None
        widths.add(len(fields))
    if 5 in widths and len(widths) > 1:
        raise DataError(f"{path}: boxes and polygons in one file; Ultralytics accepts either, not both")
    return np.array(list(rows.values()), dtype=np.float64).reshape(-1, 5)


def _parse(fields: list[str], classes: int) -> tuple[float, float, float, float, float]:
    try:
        index, *values = (float(field) for field in fields)
    except ValueError:
        raise ValueError("not all fields are numbers") from None
    if len(fields) != 5 and (len(fields) < 7 or len(fields) % 2 == 0):
        raise ValueError(
            f"got {len(fields)} numbers, expected 5 (class x y width height) or a class and 3 or more xy pairs; "
            "of labels with keypoints keep the first 5"
        )
    if not (index.is_integer() and 0 <= index < classes):
        raise ValueError(f"got class {fields[0]}, expected an integer in 0..{classes - 1}")
    if not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in values):
        raise ValueError("coordinates are outside 0..1 (fractions of the image, not pixels)")
    if len(values) > 4:
        (x1, x2), (y1, y2) = ((min(v), max(v)) for v in (values[::2], values[1::2]))
        values = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    x, y, width, height = values
    if width <= 0 or height <= 0:
        raise ValueError("width and height must be above 0")
    return index, x, y, width, height
