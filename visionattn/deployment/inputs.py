"""From images of any size to what a network takes."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from visionattn.deployment.info import ModelInfo
from visionattn.detection import letterbox

BGRImage = NDArray[np.uint8]
"""Array of shape (H, W, 3), blue first, as OpenCV reads it."""


def prepare(images: Sequence[BGRImage], info: ModelInfo, size: tuple[int, int], place: str = "cpu") -> Tensor:
    """Return the network's input, float32 (B, 3, H, W) of ``size``, on a device.

    A detector's images are fitted into a grey rectangle, in 0..1; others go through timm's transform.
    """
    if info.preprocessing is None:
        return letterbox(images, size, place)
    transform = _transform(json.dumps(info.preprocessing | {"input_size": (3, *size)}))
    return torch.stack([transform(Image.fromarray(image[..., ::-1])) for image in images]).to(place)


@cache
def _transform(config: str) -> Any:
    return create_transform(**json.loads(config))
