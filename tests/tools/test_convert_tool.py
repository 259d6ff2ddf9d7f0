"""The command line of conversion, end to end: a file that all other tools take."""

import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch

from tests.tools.conftest import TOOLS
from visionattn.backbones.classifier import load_classifier, save_classifier
from visionattn.engine.evaluate import evaluate
from visionattn.errors import ConfigError, DataError, WeightsError

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "dynamic_img_size": True}
CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes, 12 train and 4 val pictures each."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 12), ("val", 4)):
        for index, name in enumerate(("ant", "bee")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = np.random.default_rng(100 * index + i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / f"{i}.png"), image)
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file of a classifier with softmax attention."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **KWARGS)
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_classifier(model, file, name="vit_tiny_patch16_224", kwargs=KWARGS, classes=["ant", "bee"], data_config=CONFIG)
    return file


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the tool in this process as if it were the program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments, tool="convert"):
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, arguments)])
        module = runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="tool")
        module["app"](standalone_mode=False)
        return capsys.readouterr().out

    return run


def short(teacher, pictures, *more):
    steps = ("--blocks", 2, "--features", 2, "--batch", 8, "--workers", 0, "--calibration", 16, "--device", "cpu")
    return ("--model", teacher, "--images", pictures, *steps, *more)


def test_file_goes_wherever_weights_go(call, teacher, pictures, tmp_path):
    out = call(
        *short(teacher, pictures, "--to", "performer", "--option", "features=32", "--keep", "1", "--local", 3),
        *("--output", "student.safetensors", "--report", "report.json"),
        *("--score-on", pictures, "--sizes", "32,64"),
    )
    assert "written: student.safetensors" in out
    assert not (tmp_path / "student.run").exists()
    content = json.loads((tmp_path / "report.json").read_text())
    assert [block["attention"] for block in content["blocks"]] == ["performer", "softmax", "performer"]
    assert [speed["tokens"] for speed in content["speeds"]] == [17, 65]
    found = load_classifier("student.safetensors")
    assert found.classes == ["ant", "bee"]
    assert set(found.attention_layers) == {"blocks.0.attn", "blocks.2.attn"}
    assert found.attention_layers["blocks.0.attn"]["features"] == 32
    assert content["metrics"]["top1 after"] == evaluate("student.safetensors", str(pictures)).scores.top1
    x = torch.randn(2, 3, 32, 32)
    again = timm.create_model("visionattn", file="student.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again(x), found.model(x))
    call("--weights", "student.safetensors", "--format", "onnx", tool="export")  # verified against the weights
    scores = evaluate("student.onnx", str(pictures)).scores
    assert scores == evaluate("student.safetensors", str(pictures)).scores


def test_encoder_without_classes(call, pictures):
    """A timm name, no head: features in, features out."""
    kwargs = [
        part for key, value in (KWARGS | {"num_classes": 0}).items() for part in ("--model-kwargs", f"{key}={value}")
    ]
    call(
        *short("vit_tiny_patch16_224", pictures / "train" / "ant", *kwargs, "--imgsz", 32),
        *("--to", "relu", "--output", "encoder.safetensors", "--keep", "auto", "--budget", 1),
    )
    found = load_classifier("encoder.safetensors")
    assert found.classes == []
    assert len(found.attention_layers) == 2
    assert found.model(torch.randn(1, 3, 32, 32)).shape == (1, 24)
    call("--weights", "encoder.safetensors", "--format", "onnx", tool="export")
    with pytest.raises((ConfigError, DataError, WeightsError), match="class"):
        evaluate("encoder.safetensors", str(pictures))


def test_stopped_run_goes_on_to_the_same_file(call, teacher, pictures, monkeypatch):
    from visionattn.engine import convert as engine

    call(*short(teacher, pictures, "--to", "ela_hadamard", "--output", "whole.safetensors"))
    arguments = short(teacher, pictures, "--to", "ela_hadamard", "--output", "stopped.safetensors")
    real = engine.align

    def killed(*args, stage, **options):
        if stage == "features":
            raise SystemError("killed")
        return real(*args, stage=stage, **options)

    with monkeypatch.context() as context:
        context.setattr(engine, "align", killed)
        with pytest.raises(SystemError):
            call(*arguments)
    assert not Path("stopped.safetensors").exists()
    with pytest.raises(ConfigError, match="to was 'ela_hadamard'"):
        call(*short(teacher, pictures, "--to", "relu", "--output", "stopped.safetensors"))
    call(*arguments)
    whole, stopped = (load_classifier(f"{name}.safetensors").model.state_dict() for name in ("whole", "stopped"))
    for key, value in whole.items():
        assert torch.equal(value, stopped[key]), key


def test_wrong_arguments_are_named(call, teacher, pictures):
    for arguments, message in (
        (("--to", "relu", "--output", "x.pt"), "safetensors file"),
        (("--to", "relu", "--output", "x.safetensors", "--batch", "99"), "there are 24 images"),
        (("--to", "relu", "--output", "x.safetensors", "--keep", "first"), "indices of blocks"),
        (("--to", "relu", "--output", "x.safetensors", "--center", "mean"), "image, constant, none"),
        (("--to", "relu", "--output", "x.safetensors", "--option", "a"), "KEY=VALUE"),
        (("--to", "relu", "--output", "x.safetensors", "--images", "nowhere"), "no images in nowhere"),
        (("--to", "relu", "--output", "x.safetensors", "--images", "no.parquet"), r"parquet"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            call(*short(teacher, pictures, *arguments))
    assert not Path("x.safetensors").exists()


def test_budget_in_milliseconds(call, teacher, pictures):
    call(
        *short(teacher, pictures, "--to", "relu", "--output", "y.safetensors"),
        *("--keep", "auto", "--budget-ms", 10_000),
    )
    assert len(load_classifier("y.safetensors").attention_layers) == 1  # one block is left to convert
    with pytest.raises(ConfigError, match="no softmax block it takes"):
        call(
            *short(teacher, pictures, "--to", "relu", "--output", "z.safetensors"),
            *("--keep", "auto", "--budget-ms", 1e-6),
        )
