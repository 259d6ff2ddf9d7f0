"""Whether augmentations suit a detector's inputs, found out before it is trained."""

from typing import Any

import numpy as np
from ultralytics.data.augment import Albumentations
from ultralytics.utils.instance import Instances

from visionattn.errors import ConfigError


def try_augmentations(transforms: list[Any], imgsz: int) -> None:
    """Apply transforms of albumentations to inputs as Ultralytics does, a few times.

    Raises:
        ConfigError: they cannot be applied, or they change the size of the inputs, which a batch shares.
    """
    apply = Albumentations(1.0, transforms)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (imgsz, imgsz, 3), np.uint8)
        boxes = np.array([[0.1, 0.2, 0.5, 0.6], [0.4, 0.4, 0.9, 0.8]], np.float32) * imgsz
        labels = {"img": pixels, "cls": np.zeros((2, 1)), "instances": _instances(boxes)}
        try:
            found = apply(labels)["img"]
        except Exception as error:  # an augmentation refuses what it likes
            raise ConfigError(
                f"augment: it cannot be applied to inputs of {imgsz} x {imgsz} pixels: {error}"
            ) from error
        if found.shape != pixels.shape or found.dtype != np.uint8:
            raise ConfigError(
                f"augment: it makes inputs of {found.shape}, {found.dtype}, expected {pixels.shape}, uint8, by imgsz "
                f"{imgsz}; add Resize or PadIfNeeded to that size, or leave out what crops"
            )


def _instances(boxes: Any) -> Any:
    return Instances(boxes, np.zeros((0, 1000, 2), np.float32), bbox_format="xyxy", normalized=False)
