"""Images of a classification set as a model's inputs."""

import random
from collections.abc import Callable
from pathlib import Path

import albumentations as A
import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from visionattn.data import load_image, variants
from visionattn.errors import ConfigError
from visionattn.pictures import image_size


class Images(Dataset[tuple[Tensor, int]]):
    """Inputs (3, H, W) and class indices; the augmentation is a function of seed, epoch and index.

    Args:
        samples: image paths and class indices.
        transform: makes an input of a PIL image.
        augment: comes first.
        seed: of the augmentation; its other part is the attribute ``epoch``.
    """

    def __init__(
        self,
        samples: list[tuple[Path, int]],
        transform: Callable[[Image.Image], Tensor],
        augment: A.Compose | None = None,
        seed: int = 0,
    ) -> None:
        self.samples, self.transform, self.augment, self.seed = samples, transform, augment, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        image = np.ascontiguousarray(load_image(path)[..., ::-1])
        if self.augment:
            seed = seed_of(self.seed, self.epoch, index)
            self.augment.set_random_state(np.random.default_rng(seed), random.Random(seed))
            image = self.augment(image=image)["image"]
        return self.transform(Image.fromarray(image)), label


def check_input(images: Images, imgsz: int) -> None:
    """Raise a ConfigError unless augmentation and transform make inputs (3, imgsz, imgsz) of images of every size.

    Sizes are tried rather than images: the narrowest, the lowest, the largest, and as many others.
    """
    sizes = {image_size(path) for path, _ in images.samples}
    extremes = [
        min(sizes),
        min(sizes, key=lambda size: size[::-1]),
        max(sizes),
        max(sizes, key=lambda size: size[::-1]),
    ]
    chain = list(images.augment.transforms) if images.augment else []
    for width, height in dict.fromkeys([*extremes, *sorted(sizes)[:: len(sizes) // 4 + 1]]):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        for variant in variants(chain):
            try:
                shape = tuple(
                    images.transform(Image.fromarray(A.Compose(variant, seed=0)(image=pixels)["image"])).shape
                )
            except Exception as error:  # an augmentation refuses what it likes
                what = f"the images, of which one has {width} x {height} pixels"
                raise ConfigError(f"augment: it cannot be applied to {what}: {error}") from error
            if shape != (3, imgsz, imgsz):
                raise ConfigError(f"augment: it makes inputs of {shape}, expected (3, {imgsz}, {imgsz})")


def seed_of(*key: int) -> int:
    """Return a seed below 2^31 for a tuple of numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) // 2
