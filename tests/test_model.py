"""What visionattn.load gives: one answer for a picture, however it is handed over."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images
from timm.data import resolve_model_data_config

import visionattn
from visionattn.backbones.classifier import save_classifier
from visionattn.deployment import Detections, load_runner
from visionattn.errors import ConfigError, DataError, UnsupportedError, WeightsError
from visionattn.model import Found, Model

WEIGHTS = "yolo-lat-p-aquarium"
RED_FIRST: NDArray[np.uint8] = load_sample_images().images[1]


@pytest.fixture(scope="module")
def detector() -> Model:
    return visionattn.load(WEIGHTS, "cpu", conf=0.01)


@pytest.fixture(scope="module")
def expected() -> Detections:
    """Boxes of the flower by the runner, which the tests of its room compare with Ultralytics."""
    (found,) = load_runner(WEIGHTS, "cpu", conf=0.01)([RED_FIRST[..., ::-1]])
    assert isinstance(found, Detections)
    assert len(found.scores) > 2
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "flower.png"
    Image.fromarray(RED_FIRST).save(path)
    return path


def same(found: Found, expected: Detections) -> bool:
    return all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in ("boxes", "scores", "classes"))


def test_every_way_to_hand_over_a_picture(detector: Model, expected: Detections, file: Path) -> None:
    blue_first = cv2.imread(str(file))
    assert isinstance(blue_first, np.ndarray)
    assert same(detector(file), expected)
    assert same(detector(str(file)), expected)
    assert same(detector(Image.open(file)), expected)
    assert same(detector(RED_FIRST, channels="rgb"), expected)
    assert same(detector(blue_first, channels="bgr"), expected)
    assert not same(detector(RED_FIRST, channels="bgr"), expected), "the order is taken at its word"


def test_a_list_of_different_pictures(detector: Model, expected: Detections, file: Path) -> None:
    found = detector([file, RED_FIRST[:100], Image.open(file)], channels="rgb", batch=2)
    assert isinstance(found, list)
    assert [type(each) for each in found] == [Found, Found, Found]
    batched = load_runner(WEIGHTS, "cpu", conf=0.01)([RED_FIRST[..., ::-1], RED_FIRST[:100, :, ::-1]])
    assert same(found[0], batched[0])
    assert same(found[1], batched[1])
    assert same(found[2], expected)
    assert detector([]) == []
    assert len(detector([file])) == 1


def test_a_turned_picture_is_set_upright_and_left_as_it_is(detector: Model, expected: Detections, file: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the file's left is the top
    lying = Image.fromarray(np.rot90(RED_FIRST).copy())
    lying.save(file, exif=exif)
    opened = Image.open(file)
    assert same(detector(opened), expected)
    assert opened.size == lying.size


def test_names_and_supervision(detector: Model, file: Path) -> None:
    found = detector(file)
    assert found.names == tuple(detector.names[index] for index in found.classes.tolist())
    assert len(found) == len(found.scores)
    theirs = found.supervision()
    np.testing.assert_array_equal(theirs.xyxy, found.boxes)
    np.testing.assert_array_equal(theirs.confidence, found.scores)
    np.testing.assert_array_equal(theirs.class_id, found.classes)
    assert list(theirs["class_name"]) == list(found.names)
    assert len(theirs[theirs.confidence > 1]) == 0
    nothing = visionattn.load(WEIGHTS, "cpu", conf=1.0)(file)
    assert (len(nothing), nothing.names, len(nothing.supervision())) == (0, (), 0)


def test_a_classifier(tmp_path: Path, file: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    path = tmp_path / "three.safetensors"
    config = resolve_model_data_config(model)
    save_classifier(model, path, name="test_vit", kwargs={}, classes=["ant", "bee", "cat"], data_config=config)
    loaded = visionattn.load(path, "cpu")
    assert (loaded.task, loaded.names, loaded.size) == ("classify", {0: "ant", 1: "bee", 2: "cat"}, (160, 160))
    judged = loaded(file)
    transform: Any = timm.data.create_transform(**config)
    with torch.no_grad():
        truth = model(transform(Image.open(file))[None]).softmax(-1)[0]
    torch.testing.assert_close(torch.from_numpy(judged.probabilities), truth)
    order = truth.argsort(descending=True).tolist()
    assert [name for name, _ in judged.best()] == [loaded.names[index] for index in order]
    assert judged.name == loaded.names[order[0]]
    assert judged.best(1) == [(judged.name, pytest.approx(truth.max().item()))]


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (RED_FIRST, {}, ConfigError, "does not tell the order of its colours; give channels='rgb'"),
        (RED_FIRST, {"channels": "gbr"}, ConfigError, "got channels 'gbr', expected rgb"),
        (
            RED_FIRST[..., 0],
            {"channels": "rgb"},
            DataError,
            r"an array \(427, 640\) of uint8, expected \(H, W, 3\)",
        ),
        (RED_FIRST / 255, {"channels": "rgb"}, DataError, "of float64, expected .* of uint8"),
        (RED_FIRST[:0], {"channels": "rgb"}, DataError, r"got an array \(0, 640, 3\)"),
        (torch.zeros(1, 3, 8, 8), {}, DataError, "got Tensor, expected a path"),
        ("nowhere.jpg", {}, DataError, "nowhere.jpg"),
        (Image.new("F", (9, 9)), {}, DataError, "PIL's mode F"),
        ([], {"batch": 0}, ConfigError, "got batch 0"),
    ],
)
def test_what_is_no_picture(detector: Model, given: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        detector(given, **options)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not found"):
        visionattn.load(tmp_path / "none.pt")
    file = tmp_path / "maps.torchscript"
    visionattn.export("test_resnet", "torchscript", file, imgsz=64, features=True)
    with pytest.raises(UnsupportedError, match="is a backbone"):
        visionattn.load(file, "cpu", trust=True)


def test_changes_of_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("visionattn.verbs.run_training", lambda config, resume, trust: seen.append(config))
    visionattn.train("classify/digits", epochs=2, timm={"optimizer": {"lr": 0.5}})
    visionattn.train(seen[0], epochs=3)
    visionattn.train({"task": "detect", "model": "yolo-lat-p", "data": "digits-scenes", "name": "mine"}, batch=4)
    first, second, third = seen
    assert (first.name, first.epochs) == ("digits", 2)
    assert first.timm.optimizer == {"opt": "muon", "lr": 0.5, "weight_decay": 0.05}
    assert second == first.model_copy(update={"epochs": 3})
    assert (third.task, third.name, third.batch) == ("detect", "mine", 4)
    with pytest.raises(ConfigError, match="unknown key epoch"):
        visionattn.train("classify/digits", epoch=2)


def test_the_former_room_of_exports_is_a_verb_still(tmp_path: Path) -> None:
    code = """
import visionattn
from visionattn.deployment import load_runner
from visionattn.export import load_runner as former
assert former is load_runner
visionattn.export("test_resnet", "torchscript", "net.torchscript", imgsz=64, features=True)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "net.torchscript").is_file()
