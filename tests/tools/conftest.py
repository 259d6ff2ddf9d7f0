import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml

TOOLS = Path(__file__).parents[2] / "tools"


def process(name, cwd, *arguments):
    """Run a tool in a new process, in a folder that is not the repository."""
    command = [sys.executable, TOOLS / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a tool in this process as if it were the program: what it imports is there already."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        captured = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=captured.out, stderr=captured.err)

    return run


@pytest.fixture
def tool(call, monkeypatch):
    """Run a tool in this process, in a folder that is not the repository."""

    def run(name, cwd, *arguments):
        monkeypatch.chdir(cwd)
        return call(name, *arguments)

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data.yaml with four pictures of 64 x 64 of two classes."""
    root = tmp_path_factory.mktemp("pictures")
    for folder in ("images/val", "labels/val"):
        (root / folder).mkdir(parents=True)
    for i in range(4):
        image = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(root / f"images/val/{i}.png"), image)
        (root / f"labels/val/{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.4 0.4\n")
    (root / "data.yaml").write_text(yaml.safe_dump({"val": "images/val", "names": ["ant", "bee"]}))
    return root / "data.yaml"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """An untrained detector of two classes."""
    from visionattn.detection import MODELS, build_detector

    folder = tmp_path_factory.mktemp("weights")
    description = yaml.safe_load(MODELS["yolo-lat-n"].read_text()) | {"nc": 2, "scale": "n"}
    (folder / "two.yaml").write_text(yaml.safe_dump(description))
    torch.manual_seed(0)
    model = build_detector(str(folder / "two.yaml"))
    model.model.names = {0: "ant", 1: "bee"}
    model.overrides["imgsz"] = 64
    model.save(folder / "two.pt")
    return folder / "two.pt"
