import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data.yaml with eight 64 x 64 images of one bright rectangle each, two classes."""
    root = tmp_path_factory.mktemp("rectangles")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for i in range(8):
            image = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
            w, h = rng.integers(16, 32, 2)
            x, y = rng.integers(0, 64 - w), rng.integers(0, 64 - h)
            image[y : y + h, x : x + w] = (250, 250, 40) if i % 2 else (40, 250, 250)
            cv2.imwrite(str(root / "images" / split / f"{i}.png"), image)
            box = " ".join(f"{value / 64:.6f}" for value in (x + w / 2, y + h / 2, w, h))
            (root / "labels" / split / f"{i}.txt").write_text(f"{i % 2} {box}\n")
    content = {"path": str(root), "train": "images/train", "val": "images/val", "names": ["yellow", "cyan"]}
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return root / "data.yaml"


FAST = {"imgsz": 64, "batch": 4, "device": "cpu", "plots": False, "workers": 0, "verbose": False}


@pytest.fixture(scope="session")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLO-LAT-n trained for one epoch."""
    from visionattn.detection import YOLOLAT

    folder = tmp_path_factory.mktemp("trained")
    YOLOLAT("yolo-lat-n").train(data=str(tiny_data), epochs=1, save_dir=str(folder), **FAST)
    return folder / "weights" / "best.pt"


def fresh(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process, in a folder that is not the repository."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
