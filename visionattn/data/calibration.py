"""Images to calibrate a quantised network by."""

from pathlib import Path

import numpy as np

from visionattn.data.classification import load_classification_data
from visionattn.data.detection import load_detection_data
from visionattn.data.embedded import EMBEDDED, embedded_path


def calibration_images(source: str, count: int, split: str = "train") -> tuple[Path, ...]:
    """Draw images of a data set, always the same ones.

    Args:
        source: an embedded set, a data.yaml, or a folder of class folders.
        count: how many, at most.
        split: of the data; not the one that is scored.

    Raises:
        DataError: there is no such data.
    """
    place = embedded_path(source) if source in EMBEDDED else Path(source)
    if place.suffix in (".yaml", ".yml") or (place / "data.yaml").is_file():
        images = load_detection_data(source, (split,)).images[split]
    else:
        images = [path for path, _ in load_classification_data(source, (split,)).samples(split)]
    drawn = np.random.default_rng(0).permutation(len(images))[:count]
    return tuple(images[index] for index in drawn)
