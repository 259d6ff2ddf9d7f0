from pathlib import Path

import cv2
import numpy as np
import pytest

from visionattn.config import ClassifyConfig, parse_config

COUNTS = {"train": 8, "val": 5}


def make_class_folders(root: Path) -> Path:
    """Noise of 32 x 32 pixels, dark or bright, as folders of class folders; val has images that are hard to tell."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for name, level in (("bright", 150), ("dark", 90)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = (level + 12 * rng.normal(size=(32, 32, 3)) + 20 * rng.normal()).clip(0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / f"{i}.png"), image)
    return root


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_class_folders(tmp_path_factory.mktemp("levels"))


def classify_config(data: Path, output: Path, **changes: object) -> ClassifyConfig:
    """A training of seconds that uses everything random: augmentation, mixup, EMA, dropped paths."""
    raw = {
        "task": "classify",
        "model": "test_vit",
        "data": str(data),
        "name": "run",
        "output": str(output),
        "epochs": 3,
        "batch": 4,
        "imgsz": 32,
        "device": "cpu",
        "workers": 0,
        "augment": [{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}],
        "timm": {
            "model": {"drop_path_rate": 0.2},
            "optimizer": {"opt": "adamw", "lr": 1e-3},
            "scheduler": {"sched": "cosine", "step_on_epochs": False},
            "mixup": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
            "ema": {"decay": 0.9},
        },
    }
    config = parse_config(raw | changes)
    assert isinstance(config, ClassifyConfig)
    return config
