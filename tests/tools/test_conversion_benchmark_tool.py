"""The bench of conversions says what it lacks, with exit code 2, and writes nothing."""

import sys

import pytest
import torch

from visionattn.engine import img_focus


@pytest.mark.parametrize("command", ["swap", "train"])
def test_images_need_pyarrow(call, tmp_path, monkeypatch, command):
    (tmp_path / "train-0.parquet").touch()
    monkeypatch.setattr(img_focus, "load", lambda _: (torch.nn.Identity(), torch.nn.Identity()))
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    options = ("--weights", tmp_path / "w.safetensors", "--data", tmp_path, "--output", tmp_path / "o.json")
    done = call("benchmark_conversion", command, *options)
    assert done.returncode == 2
    assert "pip install pyarrow" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["train-0.parquet"]


def test_the_wheel_needs_onnx(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    done = call(
        "benchmark_conversion", "prepare", "--wheel", tmp_path / "w.whl", "--weights", tmp_path / "w.safetensors"
    )
    assert done.returncode == 2
    assert "pip install 'visionattn[onnx]'" in done.stderr
    assert not any(tmp_path.iterdir())
