"""The command line of export, end to end."""

import re
import shutil
from functools import partial

import onnx
import pytest
import torch

from tests.deployment.conftest import make_detector
from visionattn.cli import size_of
from visionattn.data.scenes import make_scenes
from visionattn.deployment import load_runner
from visionattn.deployment.info import size_text
from visionattn.deployment.runner import open_session
from visionattn.errors import ConfigError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A set of ten classes."""
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, size=64, counts={"train": 12, "val": 3})
    return folder / "data.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A detector of ten classes."""
    return make_detector(tmp_path_factory.mktemp("ten"), nc=10)


@pytest.fixture
def weights(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(made, tmp_path / "ten.pt")
    return "ten.pt"


@pytest.fixture
def export(call):
    return partial(call, "export")


def test_onnx_with_scores(export, weights, scenes, tmp_path):
    done = export("--weights", weights, "--verify-data", scenes, "--imgsz", "64,96", "--batch", 2)
    assert done.returncode == 0, done.stderr
    assert "ten.pt: detect, fp32, at 64x96 px, batch 2" in done.stdout
    assert "dynamic: nothing; nms: none; ONNX opset: 18" in done.stdout
    assert re.search(r"largest relative error \d\.\d\de-\d\d, accepted for fp32: 0\.0001", done.stdout)
    before, after = re.search(r"scores on \S+ val: weights (\S+), file (\S+)", done.stdout).groups()
    assert abs(float(before) - float(after)) <= 0.0005
    assert f"written: {tmp_path / 'ten.onnx'}" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"ten.pt", "ten.onnx"}
    assert load_runner("ten.onnx").size == (64, 96)
    assert [d.dim_value for d in onnx.load("ten.onnx").graph.input[0].type.tensor_type.shape.dim] == [2, 3, 64, 96]


def test_a_file_that_scores_less_is_not_kept(export, weights, scenes, tmp_path, monkeypatch):
    scores = iter((0.5, 0.499))
    monkeypatch.setattr("visionattn.engine.scores._headline", lambda *_: next(scores))
    done = export("--weights", weights, "--format", "torchscript", "--verify-data", scenes, "--imgsz", 64)
    assert done.returncode == 2
    assert re.search(
        r"error: the file has 0\.4990 on \S+ val, its weights 0\.5000; .* 0\.0005 less.*Nothing was written",
        done.stderr,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["ten.pt"]


def test_data_of_other_classes(export, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = export("--weights", "yolo-lat-n", "--format", "torchscript", "--imgsz", 64, "--verify-data", scenes)
    assert done.returncode == 2
    assert "error: the weights know 80 classes" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_options_of_a_model_of_timm(export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--model-kwargs", "depth=1", "--model-kwargs", "attn_layer=ela_sum", "--model-kwargs", "num_classes=7")
    done = export("--weights", "test_vit", "--format", "torchscript", *options)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "runs" / "export" / "test_vit.torchscript"
    assert f"written: {path}" in done.stdout
    session = open_session(path, trust=True)
    assert session(torch.zeros(2, 3, 160, 160))[0].shape == (2, 7)
    assert len([name for name in session.module.state_dict() if name.endswith("mlp.fc1.weight")]) == 1


def test_shipped_weights_are_told_from_a_model_without(export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, trained in (("yolo-lat-p-aquarium", True), ("yolo-lat-p", False)):
        done = export("--weights", name, "--format", "torchscript", "--imgsz", 64)
        assert done.returncode == 0, done.stderr
        assert ("untrained" in done.stdout) is not trained


def test_features(export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--features", "--output", "here.torchscript", "--imgsz", 64)
    done = export("--weights", "test_resnet", "--format", "torchscript", *options)
    assert done.returncode == 0, done.stderr
    assert "test_resnet: features, fp32, at 64 px, batch 1" in done.stdout
    for name in ("map0", "map1"):
        assert name in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["here.torchscript"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the engine runs")
def test_an_engine_is_told_not_to_have_run(export, weights, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings")
    options = ("--format", "tensorrt-rtx", "--precision", "fp16", "--level", 0, "--workspace", 1, "--imgsz", 64)
    done = export("--weights", weights, *options)
    assert done.returncode == 0, done.stderr
    assert "the file was built but NOT RUN here; the graph that it was built of was compared. " in done.stdout
    assert "need an NVIDIA GPU, and there is none here" in done.stdout
    assert re.search(r"largest float16 value on photographs: \S+ \(\S+\), of 65504", done.stdout)
    assert f"written: {tmp_path / 'ten-fp16.rtx.engine'}" in done.stdout


@pytest.mark.slow
def test_int8_by_calibration(export, weights, scenes, tmp_path):
    options = ("--precision", "int8", "--calibrate", scenes, "--calibration-size", 12, "--imgsz", 64)
    done = export("--weights", weights, *options)
    assert done.returncode == 0, done.stderr
    assert re.search(r"largest rms error \S+, accepted for int8: 0\.15", done.stdout)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load("ten-int8.onnx").graph.node}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dynamic", "batch,sizes"), "--dynamic batch,sizes: 'sizes'; accepted: batch, size; nearest: size"),
        (("--model-kwargs", "depth"), "--model-kwargs depth: expected KEY=VALUE, e.g. attn_layer=slay"),
        (("--model-kwargs", "depth=2"), "ten.pt is a detector; features and model_kwargs"),
        (("--imgsz", "wide"), "got size 'wide'; give a side in pixels such as 320, or height and width"),
        (("--imgsz", "70"), "size (70, 70): both sides must be multiples of the model's stride, 16"),
        (("--format", "onxn"), "format 'onxn'; accepted: onnx,"),
        (("--output", "m.pt"), "names of onnx end in .onnx"),
        (("--precision", "int8"), "int8 needs images to calibrate by"),
        (("--nms", "embedded", "--conf", "1.5"), "got conf 1.5, iou 0.7, max_det 300; expected 0..1"),
        (("--conf", "0.25"), "conf, iou and max_det are fixed in a file by nms=embedded alone, got nms=none"),
        (("--nms", "free", "--max-det", "10"), "by nms=embedded alone, got nms=free"),
        (("--batch", "0"), "got batch 0, expected 1 or more"),
        (("--precision", "int8", "--calibrate", "nowhere"), "nowhere"),
        (("--max-size", "1,2,3"), "got size '1,2,3'"),
    ],
)
def test_bad_options(export, weights, tmp_path, options, message):
    done = export("--weights", weights, *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ten.pt"]


@pytest.mark.parametrize("options", [("--precision", "fp64"), ("--nms", "soft"), ("--level", "6"), ()])
def test_options_that_typer_refuses(export, weights, tmp_path, options):
    done = export(*(("--weights", weights) if options else ()), *options)
    assert done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["ten.pt"]


def test_weights_that_are_none(export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("no weights")
    for name, message in (("text.pt", "text.pt is damaged"), ("gone.pt", "weights not found: gone.pt")):
        done = export("--weights", name)
        assert (done.returncode, message in done.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["text.pt"]


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "size"),
        [("", None), ("320", (320, 320)), ("480,640", (480, 640)), ("480x640", (480, 640)), ("1", (1, 1))],
    )
    def test_are_read(self, text, size):
        assert size_of(text) == size

    @pytest.mark.parametrize("text", ["0", "-3", "a", "1,2,3", "3.5", ",", "320,", "0,32", "32x0"])
    def test_or_refused(self, text):
        with pytest.raises(
            ConfigError, match=r"give a side in pixels such as 320, or height and width such as 480,640"
        ):
            size_of(text)

    @pytest.mark.parametrize("size", [(320, 320), (480, 640)])
    def test_and_written(self, size):
        assert size_of(size_text(size)) == size
