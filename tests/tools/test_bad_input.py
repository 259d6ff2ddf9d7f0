"""What is wrong is said in one error with exit code 2, before anything is written."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.data.conftest import save_image, truncate
from visionattn.data.scenes import make_scenes
from visionattn.detection import MODELS
from visionattn.detection.device_loader import UNSUPPORTED


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, size=64, counts={"train": 4, "val": 4})
    return folder


@pytest.fixture
def place(scenes, tmp_path, monkeypatch):
    """The working folder: a set of pictures, a configuration, and files that are no weights of ours."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scenes, "set")
    options = {"epochs": 1, "batch": 4, "imgsz": 64, "device": "cpu", "workers": 0, "ultralytics": {"plots": False}}
    config = {"task": "detect", "model": "yolo-lat-n", "data": "set/data.yaml", **options}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "text.pt").write_text("these are no weights")
    torch.save({"model": Code(tmp_path / "code-ran")}, "code.pt")
    save_file({"weight": torch.zeros(1)}, "foreign.safetensors")
    return tmp_path


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(call, place, name, *arguments):
    """Run a tool that must refuse; returns its error."""
    before = files(place)
    done = call(name, *arguments)
    assert done.returncode == 2, done.stderr
    assert files(place) == before
    assert "Traceback" not in done.stderr
    errors = re.split(r"(?:^|[\r\n])error: ", done.stderr)
    assert len(errors) == 2, done.stderr
    return errors[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", "unknown key epoch; accepted: .*; nearest: epochs"),
        ("ultralytics.lr=1", "unknown key ultralytics.lr; accepted: .*; nearest: .*lr0"),
        ("ultralytics.epochs=3", "ultralytics.epochs cannot be set here; see the top-level keys"),
        ("ultralytics.mosaic=abc", "Ultralytics refuses an option: .*mosaic"),
        ("ultralytics.single_cls=true", "ultralytics.single_cls cannot be set here"),
        ("device=7", "Ultralytics refuses an option: .*device"),
        ("seed=99999999999999", "seed: got 99999999999999"),
        ("model=set", "model 'set'"),
        ("output=c.yaml", "c.yaml"),
        ("data=digits", "expected the path of a data.yaml.*accepted: digits-scenes"),
        ("data=set/dataa.yaml", "there is no file .*/set/dataa.yaml; expected the path of a data.yaml"),
        ("model=yolo-lat-q", "unknown model 'yolo-lat-q'; accepted: .*yolo-lat-n"),
        ("model=missing.pt", "weights not found: missing.pt; give a .pt file"),
        ("model=text.pt", "text.pt is damaged or no PyTorch checkpoint; give a .pt file that our training wrote"),
        ("model=code.pt", "code.pt asks for code outside the known model classes.* pass --trust-weights"),
    ],
)
def test_training_a_detector_refuses(call, place, override, message):
    error = refused(call, place, "train", "--config", "c.yaml", "--set", override)
    assert re.search(message, error, re.DOTALL)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_batches_made_on_the_device_know_fewer_options(call, place, name):
    overrides = ("--set", "loader=device", "--set", f"ultralytics.{name}={'true' if name == 'rect' else 0.001}")
    error = refused(call, place, "train", "--config", "c.yaml", *overrides)
    assert error == f"loader: device does no {name}; set them to 0, or take loader: workers\n"


CROP = "augment: it makes inputs of .*, expected .64, 64, 3., uint8, by imgsz 64"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "augment=[{RandomCrop: {height: 500, width: 500, p: 0.1}}]",
            "augment: it cannot be applied to inputs of 64 x 64",
        ),
        ("augment=[{BBoxSafeRandomCrop: {p: 0.1}}]", CROP),
        ("augment=[{CenterCrop: {height: 32, width: 32, p: 0.1}}]", CROP),
        ("augment=[{CenterCrop: {height: 32, width: 32, p: 1}}, {Resize: {height: 64, width: 64, p: 0.5}}]", CROP),
        ("ultralytics.freeze=99", r"ultralytics.freeze: got layer \d+; the layers are 0 to \d+"),
        ("ultralytics.freeze=[99]", "ultralytics.freeze: got layer 99"),
        ("ultralytics.freeze=[nose]", "ultralytics.freeze: got 'nose', which names no part with weights"),
        ("ultralytics.pretrained=nope", "ultralytics.pretrained: weights not found: nope; give a .pt file, or one of"),
        ("ultralytics.distill_model=nope.pt", "ultralytics.distill_model: weights not found: nope.pt"),
        ("imgsz=70", "imgsz: got 70, expected a multiple of 32, such as 64 or 96"),
        ("ultralytics.lr0=0.1", "lr0 and momentum are not used with optimizer: auto, .*; set ultralytics.optimizer"),
        ("ultralytics.cache=disk", "cache: disk writes NAME.npy beside each picture"),
    ],
)
def test_what_training_would_stop_at_is_found_before(call, place, override, message):
    error = refused(call, place, "train", "--config", "c.yaml", "--set", override)
    assert re.search(message, error, re.DOTALL)
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("augment=[{RandomCrop: {height: 32, width: 32, p: 0.1}}]", "of which one has 24 x 64 pixels: Crop size"),
        ("batch=1", "batch: got 1, which this model cannot be trained by .*; give 2 or more"),
        ("device=cuda:77", "device"),
    ],
)
def test_training_a_classifier_refuses(call, place, override, message):
    for split in ("train", "val"):
        for name in "ab":
            for number, size in enumerate([(64, 64), (64, 64), (24, 64), (64, 64)]):
                save_image(place / "k" / split / name / f"{number}.png", size)
    options = {"epochs": 1, "batch": 4, "imgsz": 32, "device": "cpu", "workers": 0}
    config = {"task": "classify", "model": "lat_nano", "data": "k", **options}
    (place / "k.yaml").write_text(yaml.safe_dump(config))
    error = refused(call, place, "train", "--config", "k.yaml", "--set", override)
    assert re.search(message, error, re.DOTALL)


def test_batches_made_on_the_device_know_no_albumentations(call, place):
    overrides = ("--set", "loader=device", "--set", "augment=[{ToGray: {p: 0.5}}]", "--set", "ultralytics.mixup=0.5")
    error = refused(call, place, "train", "--config", "c.yaml", *overrides)
    assert error.startswith("loader: device does no mixup, augment; ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model to train, and no runs in league.json; give --model"),
        (["--model", "yolo-lat-p", "--model", "else/yolo-lat-p.yaml"], "models share the names yolo-lat-p; give each"),
        (["--model", "yolo-lat-p", "--seed", "1", "--seed", "1"], "got the seeds 1, 1; give each once"),
        (["--control", "yolo26:slim"], "control 'yolo26:slim'; expected a family of Ultralytics and a width"),
        (["--model", "yolo-lat-q"], "unknown model 'yolo-lat-q'"),
        (["--model", "missing.yaml"], "missing.yaml"),
        (["--model", "yolo-lat-p", "--set", "epoch=3"], "unknown key epoch"),
        (["--model", "yolo-lat-p", "--set", "task=classify"], "unknown key"),
    ],
)
def test_a_benchmark_that_cannot_begin(call, place, arguments, message):
    (place / "else").mkdir()
    shutil.copyfile(MODELS["yolo-lat-p"], place / "else" / "yolo-lat-p.yaml")
    error = refused(call, place, "benchmark_detectors", "--config", "c.yaml", *arguments, "--output", "league.json")
    assert message in error


def test_training_that_cannot_begin_leaves_no_run_folder(call, place):
    done = call("train", "--config", "c.yaml", "--set", "ultralytics.optimizer=foo")
    assert done.returncode == 2
    assert "this training cannot begin: " in done.stderr
    assert "foo" in done.stderr
    assert not (place / "runs" / "detect" / "c").exists()


def test_training_without_the_images(call, place):
    shutil.rmtree("set/images/val")
    error = refused(call, place, "train", "--config", "c.yaml")
    assert f"val: {place}/set/images/val does not exist; correct path or val" in error


def test_training_names_what_is_broken_and_goes_on_without_it(call, place, caplog):
    image, label = place / "set/images/train/00001.jpg", place / "set/labels/val/00002.txt"
    truncate(image)
    label.write_text("1 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1\n")
    error = refused(call, place, "train", "--config", "c.yaml")
    assert f"{image}: unreadable image: " in error
    assert f"{label}:2: got 4 numbers, expected 5" in error
    assert "the line is: 1 0.5 0.5 0.1\n" in error
    assert "go on without them (skip_broken)" in error

    done = call("train", "--config", "c.yaml", "--set", "skip_broken=true")
    assert done.returncode == 0, done.stderr
    assert f"left out: {image}: " in caplog.text
    assert f"{label}:2" in caplog.text
    run = place / "runs" / "detect" / "c"
    for split, broken in (("train", image.name), ("val", "00002.jpg")):
        listed = (run / "data" / f"{split}.txt").read_text()
        assert listed.count("\n") == 3
        assert broken not in listed
    assert (run / "metrics.json").is_file()


@pytest.mark.parametrize("name", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("missing.safetensors", "weights not found: missing.safetensors; give a file that training wrote"),
        ("c.yaml", "c.yaml: a yaml holds no weights; give a file that training wrote, or one of .*yolo-lat-p-aquarium"),
        ("yolo-lat-p", "yolo-lat-p.yaml: a yaml holds no weights"),
        ("text.pt", "text.pt is damaged or no PyTorch checkpoint; give a .pt file that our training wrote"),
        ("code.pt", "code.pt asks for code outside the known model classes.* pass --trust-weights"),
        ("foreign.safetensors", "foreign.safetensors"),
    ],
)
def test_weights_that_are_not_ours(call, place, name, file, message):
    what = ("--data", "set/data.yaml") if name == "evaluate" else ("--source", "set/images/val")
    error = refused(call, place, name, "--weights", file, *what, "--output", "out")
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_evaluating_on_other_classes(call, place, weights):
    error = refused(call, place, "evaluate", "--weights", weights, "--data", "set/data.yaml", "--output", "out.json")
    assert "the weights know 2 classes (ant, bee), the data set set has 10 (0, 1, 2, 3, 4, ...); give " in error


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("clip.mp4", "source not found: clip.mp4; give a picture, a folder, a video, or a camera's number such as 0"),
        ("set/labels", "no pictures in .*/set/labels; suffixes known: .*.jpg"),
        ("c.yaml", "c.yaml can be decoded neither as a picture nor as a video; convert it to png or mp4"),
        ("", "source is empty; give a picture"),
        ("²", "source not found: ²; give a picture"),
        ("٣", "source not found: ٣; give a picture"),
        ("99", "camera 99 cannot be opened; check that it is plugged in.* or give a picture"),
    ],
)
def test_a_source_that_is_none(call, place, weights, source, message):
    error = refused(call, place, "predict", "--weights", weights, "--source", source)
    assert re.search(message, error)
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["yolov8n.pt", "evil.PT"])
def test_no_name_of_weights_gets_around_restricted_loading(call, place, name):
    Path(place, name).write_bytes(Path(place, "code.pt").read_bytes())
    for model in {name, name.removesuffix(".pt")}:
        refused(call, place, "train", "--config", "c.yaml", "--set", f"model={model}")


def test_a_model_yaml_runs_no_code(call, place):
    text = MODELS["yolo-lat-n"].read_text()
    Path(place, "m.yaml").write_text(text + f"\nactivation: \"open('{place}/ran', 'w') and torch.nn.SiLU()\"\n")
    refused(call, place, "train", "--config", "c.yaml", "--set", "model=m.yaml")


def test_a_label_cache_is_neither_read_nor_written(call, place):
    class Code:
        def __reduce__(self):
            return open, (str(place / "ran"), "w")

    for split in ("train", "val"):
        cache = place / "set" / "labels" / f"{split}.cache"
        with cache.open("wb") as file:
            np.save(file, np.array([Code()], dtype=object), allow_pickle=True)
    before = files(place / "set")
    done = call("train", "--config", "c.yaml")
    assert done.returncode == 0, done.stderr
    assert not (place / "ran").exists()
    assert files(place / "set") == before


def test_resuming_what_is_no_run_leaves_it_alone(call, place):
    folder = place / "runs" / "detect" / "keep"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    overrides = ("--set", "name=keep", "--set", "ultralytics.optimizer=foo")
    error = refused(call, place, "train", "--config", "c.yaml", *overrides, "--resume")
    assert "holds no run of ours" in error
