from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.data.scenes import make_scenes

SetMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small digits-scenes set; not to be written to."""
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, counts={"train": 24, "val": 12})
    return folder


def save_image(path: Path, size: tuple[int, int] = (40, 30), **options: object) -> Path:
    """Write a picture of noise, which does not compress away, of (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def truncate(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def make_set(tmp_path: Path) -> SetMaker:
    """Makes a detection set of 2 classes from {"train/a": label text or None for no file}; returns its data.yaml."""

    def make(labels: dict[str, str | None], yaml: str | None = None) -> Path:
        for name, text in labels.items():
            save_image(tmp_path / "images" / f"{name}.png")
            label = tmp_path / "labels" / f"{name}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                label.write_text(text)
        file = tmp_path / "data.yaml"
        file.write_text(yaml or "train: images/train\nval: images/val\nnames: [cat, dog]\n")
        return file

    return make
