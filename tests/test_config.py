from pathlib import Path

import pytest

from visionattn.config import ClassifyConfig, DetectConfig, load_config
from visionattn.errors import ConfigError
from visionattn.packaged import packaged

DETECT = "task: detect\nmodel: yolo-lat-n\ndata: digits-scenes\n"
CLASSIFY = "task: classify\nmodel: vit_tiny_patch16_224\ndata: digits\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_and_host_options(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, DETECT + "ultralytics: {lr0: 1e-3, mosaic: 0}\n"))
    assert isinstance(config, DetectConfig)
    assert config.name == "run"
    assert config.ultralytics == {"lr0": 0.001, "mosaic": 0}


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        "epochs=3",
        "timm.model.attn_layer=elu",
        "timm.optimizer.lr=5e-4",
        "augment=[{ToGray: {p: 0.5}}]",
    ]
    config = load_config(write(tmp_path, CLASSIFY), overrides)
    assert isinstance(config, ClassifyConfig)
    assert config.epochs == 3
    assert config.timm.model == {"attn_layer": "elu"}
    assert config.timm.optimizer == {"lr": 0.0005}
    assert config.augment == [{"ToGray": {"p": 0.5}}]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (DETECT + "epoch: 3\n", [], r"unknown key epoch; accepted: .*; nearest: epochs"),
        (CLASSIFY + "timm: {optimiser: {}}\n", [], r"unknown key timm\.optimiser; .*nearest: optimizer"),
        (DETECT, ["timm.model.x=1"], r"unknown key timm; accepted"),
        (DETECT, ["epochs=many"], r"epochs: got 'many', input should be a valid integer"),
        (DETECT, ["epochs=0"], r"epochs: got 0, .*greater than or equal to 1"),
        (DETECT, ["imgsz=32"], r"imgsz: got 32, .*greater than or equal to 64"),
        (DETECT, ["epochs"], r"--set epochs: expected key\.sub=value"),
        (DETECT + "loader: gpu\n", [], r"loader: got 'gpu', input should be 'workers' or 'device'"),
        (CLASSIFY + "loader: device\n", [], r"unknown key loader"),
        (DETECT, ["epochs.x=1"], r"epochs is a value|epochs: got \{'x': 1\}"),
        (DETECT, ["model.x=1"], r"model is a value, not a mapping"),
        (DETECT, ["task=segment"], r"task: got 'segment', expected detect or classify"),
        ("model: a\ndata: b\n", [], r"task: got None, expected detect or classify"),
        ("task: detect\nmodel: a\n", [], r"missing key data"),
        ("- a\n", [], r"got list, expected a mapping"),
        ("a: [\n", [], r"not valid YAML"),
        (DETECT, ["data=${VISIONATTN_NOWHERE}/x"], r"VISIONATTN_NOWHERE is not set"),
    ],
)
def test_refusals(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), overrides)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config file not found"):
        load_config(tmp_path / "none.yaml")


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETS", "/sets")
    assert load_config(write(tmp_path, DETECT), ["data=${SETS}/a/data.yaml"]).data == "/sets/a/data.yaml"


@pytest.mark.parametrize("path", packaged("configs").values(), ids=lambda path: path.stem)
def test_shipped_configs_are_valid_receipts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONATTN_DATA", "/sets")
    load_config(path)
    header = path.read_text().split("task:")[0]
    assert f"visionattn train --config {path.parent.name}/{path.stem}" in header, "a config says how it is run"
