"""Detectors of Ultralytics whose boxes are in another form than ours are refused, not read wrong."""

import json
from pathlib import Path

import pytest
import torch
from ultralytics import RTDETR

from visionattn.deployment import load_runner
from visionattn.deployment.info import read_info
from visionattn.detection import build_detector, check_form, load_detector
from visionattn.errors import ConfigError, WeightsError

RTDETR_TINY = """
nc: 2
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [[0, 1, 2], 1, RTDETRDecoder, [nc, 32, 10, 4, 4, 1]]
"""


@pytest.fixture(scope="module")
def rtdetr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rtdetr")
    (folder / "rtdetr-tiny.yaml").write_text(RTDETR_TINY)
    RTDETR(str(folder / "rtdetr-tiny.yaml")).save(folder / "other.pt")
    return folder


def test_its_weights_are_refused_wherever_they_are_loaded(rtdetr: Path) -> None:
    for load in (load_detector, build_detector, load_runner):
        with pytest.raises(WeightsError, match=r"other\.pt: its head is RTDETRDecoder, which gives boxes in another"):
            load(str(rtdetr / "other.pt"))


def test_its_yaml_is_no_model_to_train(rtdetr: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(RTDETR_TINY)
    for yaml in (rtdetr / "rtdetr-tiny.yaml", tmp_path / "own.yaml"):
        with pytest.raises(ConfigError, match=r"RTDETRDecoder|cannot be built"):
            build_detector(str(yaml))


@pytest.mark.parametrize(
    ("shape", "finished"), [((1, 300, 6), False), ((1, 300, 84), False), ((1, 300, 7), True), ((300, 6), True)]
)
def test_an_output_of_another_form_is_refused(shape: tuple[int, ...], finished: bool) -> None:
    with pytest.raises(WeightsError, match="this detector gives an output of"):
        check_form(torch.zeros(shape), finished, classes=2)


@pytest.mark.parametrize(("shape", "finished"), [((1, 6, 84), False), ((2, 6, 6), False), ((1, 300, 6), True)])
def test_an_output_of_ours_is_not(shape: tuple[int, ...], finished: bool) -> None:
    check_form(torch.zeros(shape), finished, classes=2)


def test_a_file_that_ultralytics_exported_of_it() -> None:
    names = {0: "a", 1: "b"}
    found = {"task": "detect", "imgsz": [64, 64], "names": names, "batch": 1, "stride": 32, "args": {}}
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
    text |= {"names": str(names), "head": "Detect"}
    assert read_info(text, "m.onnx").names == names
    with pytest.raises(WeightsError, match=r"m\.onnx does not say what it is: .*its head is RTDETRDecoder"):
        read_info(text | {"head": "RTDETRDecoder"}, "m.onnx")
