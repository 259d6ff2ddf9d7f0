"""The wheel, installed into a fresh environment, does what the README says in an empty folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy: building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("visionattn", "configs", "weights"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    paths = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    Path(paths.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True)
    return folder


@pytest.fixture
def run(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a program of the environment in an empty folder."""
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(*words: object) -> "subprocess.CompletedProcess[str]":
        name, *arguments = map(str, words)
        command = [str(environment / "bin" / name), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_holds_configs_yamls_and_weights(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    roots = {ROOT / "visionattn": "", ROOT / "configs": "visionattn/", ROOT / "weights": "visionattn/"}
    shipped = [
        place + path.relative_to(ROOT).as_posix()
        for root, place in roots.items()
        for path in root.rglob("*")
        if path.suffix in (".py", ".yaml", ".pt", ".typed")
    ]
    assert len([name for name in shipped if not name.endswith(".py")]) >= 7 + 4 + 3 + 1
    assert set(shipped) <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"visionattn"}, "no tests, no tools"
    assert wheel.stat().st_size < 8e6


def test_the_package_is_that_of_the_wheel(run: Run, environment: Path) -> None:
    done = run("python", "-c", "import visionattn; print(visionattn.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(environment)
    assert "train" in run("visionattn", "--help").stdout


def test_picture_to_boxes_by_packaged_weights(run: Run, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "noise.png"), picture)
    done = run("visionattn", "predict", "--source", "noise.png", "--device", "cpu", "--conf", "0.001")
    assert re.search(r"found \d+ \w+.* in 1 frames", done.stdout), "boxes of classes that it knows"
    drawn = cv2.imread(str(tmp_path / "runs/predict/noise/noise.png"))
    assert drawn is not None
    assert drawn.shape == picture.shape
    assert (drawn != picture).any()


def test_train_evaluate_export_predict(run: Run, tmp_path: Path) -> None:
    done = run("visionattn", "train", "--config", "classify/digits", "--set", "epochs=1", "--set", "device=cpu")
    assert f"weights  {tmp_path / 'runs/classify/digits/weights/best.safetensors'}\n" in done.stdout
    weights = ("--weights", "runs/classify/digits/weights/best.safetensors")
    scored = ("--data", "digits", "--device", "cpu", "--output")
    run("visionattn", "evaluate", *weights, *scored, "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == 355
    assert scores["scores"]["top1"] > 0.15, "better than chance after an epoch"
    assert scores["environment"]["command"].startswith("visionattn evaluate ")
    done = run("visionattn", "export", *weights, "--format", "onnx", "--dynamic", "batch")
    exported = tmp_path / "runs/classify/digits/weights/best.onnx"
    assert f"written: {exported}" in done.stdout
    run("visionattn", "evaluate", "--weights", exported, *scored, "exported.json")
    again = json.loads((tmp_path / "exported.json").read_text())["scores"]["top1"]
    assert again == pytest.approx(scores["scores"]["top1"], abs=0.01)
    assert "in 355 frames" in run("visionattn", "predict", "--weights", exported, "--source", "digits").stdout


def test_export_of_packaged_weights(run: Run, tmp_path: Path) -> None:
    done = run("visionattn", "export", "--weights", "yolo-lat-p-aquarium", "--format", "torchscript", "--imgsz", 64)
    assert f"written: {tmp_path / 'runs/export/yolo-lat-p-aquarium.torchscript'}" in done.stdout
    assert "untrained" not in done.stdout


def test_quickstart_in_python(run: Run, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "picture.jpg"), np.full((60, 80, 3), 90, np.uint8))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), re.DOTALL)
    assert "runs/predict/picture/picture.jpg" in run("python", "-c", code).stdout


def test_commands_of_the_readme(run: Run, tmp_path: Path) -> None:
    """In fewer epochs; everything else as it stands there."""
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for value in range(3):
        writer.write(np.full((64, 96, 3), 80 * value, np.uint8))
    writer.release()
    uses = (ROOT / "README.md").read_text().split("\n### 3.")[1].split("\n## ")[0]
    lines = [line for block in re.findall(r"```bash\n(.*?)```", uses, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 7
    for line in lines:
        run(*shlex.split(line.replace("epochs=20", "epochs=1"), comments=True))
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 200
    assert (tmp_path / "runs/export/yolo-lat-n-aquarium-fp16.onnx").is_file()
    assert len(list((tmp_path / "runs/predict").iterdir())) == 2, "two clips"
