"""docs/quickstart.md is executed: its Python, and its command lines."""

import re
import shlex
from pathlib import Path

import cv2
import pytest
from sklearn.datasets import load_sample_images

from visionattn.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "quickstart.md").read_text()
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(COMMANDS,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for a picture."""
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("picture.jpg", load_sample_images().images[1][..., ::-1])
    return tmp_path


def test_python(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(compile(PYTHON, "docs/quickstart.md", "exec"), names)
    assert "Detections(xyxy=" in capsys.readouterr().out
    assert (folder / "runs/classify/digits/weights/best.onnx").is_file()
    assert (folder / "runs/predict/picture/picture.jpg").is_file()


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in COMMANDS.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "visionattn"
        app(arguments, standalone_mode=False)
    assert "355 images at 32 px" in capsys.readouterr().out
    assert (folder / "runs/classify/short/weights/best.onnx").is_file()
    assert (folder / "runs/predict/picture/picture.jpg").is_file()
