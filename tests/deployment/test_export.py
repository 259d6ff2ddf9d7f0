"""Every format and precision computes what the bare modules compute, and says what it is."""

import inspect
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import timm
import torch
import yaml
from ultralytics import YOLO

from tests.deployment.conftest import CLASSES, SIZE, STRIDE, make_detector, pictures, raw_truth
from visionattn.attention import ATTENTION
from visionattn.attention.features import RandomFeatures
from visionattn.deployment import load_runner
from visionattn.deployment.export import default_path, export
from visionattn.deployment.formats import FORMATS
from visionattn.deployment.network import Request, load_network
from visionattn.deployment.runner import open_session
from visionattn.errors import ConfigError, UnsupportedError

RUNNABLE = {name: form for name, form in FORMATS.items() if not form.of_hardware}
FLOATS = [(name, p) for name, form in RUNNABLE.items() for p in form.precisions if p != "int8"]


def fast(params, *chosen):
    """Leave what is not chosen to the slow lane."""
    return [each if each in chosen else pytest.param(*np.atleast_1d(each), marks=pytest.mark.slow) for each in params]


NEAR = {"fp32": 5e-5, "fp16": 8e-3}
"""Of the largest magnitude: float32 has a rounding of 6e-8, float16 one of 5e-4, and a dozen layers add theirs up."""
RANDOM = [name for name, kind in ATTENTION.items() if issubclass(kind, RandomFeatures)]
SIZES = [(64, 96), (32, 32), (96, 48), (160, 64)]


def close(found, truth, precision):
    """The largest difference is small against the largest magnitude, and the truth is no constant."""
    assert found.shape == truth.shape
    assert truth.std() > 1e-3
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=NEAR[precision] * float(truth.abs().max()))


def run(path, images):
    return open_session(Path(path), trust=True)(images)


def detector_close(found, truth, precision):
    close(found[:, :4], truth[:, :4], precision)
    close(found[:, 4:], truth[:, 4:], precision)
    assert truth[:, 4:].max() > 0.3


@pytest.mark.parametrize(
    ("form", "precision"),
    fast(FLOATS, *((name, "fp32") for name in RUNNABLE), ("onnx", "fp16"), ("torchscript", "fp16")),
)
def test_a_rectangle_of_a_fixed_size_and_batch(exported, tiny, form, precision):
    done = exported(tiny, form, size=SIZE, batch=2, precision=precision)
    for count in (1, 2, 5):  # filled up, as it is, split
        images = pictures(count, SIZE, seed=count)
        detector_close(run(done.path, images)[0], raw_truth(tiny, images), precision)
    with pytest.raises(UnsupportedError, match=r"got images of \(64, 64\)"):
        run(done.path, pictures(1, (64, 64)))


@pytest.mark.parametrize("form", fast(RUNNABLE, "onnx", "torchscript"))
def test_any_batch_and_size(exported, tiny, form):
    done = exported(tiny, form, size=SIZE, dynamic=("batch", "size"))
    session = open_session(done.path, trust=True)
    for count, size in zip((1, 2, 5, 3), SIZES, strict=True):
        images = pictures(count, size, seed=count)
        detector_close(session(images)[0], raw_truth(tiny, images), "fp32")


@pytest.mark.parametrize("form", fast(RUNNABLE, "onnx"))
def test_a_classifier_of_any_batch(exported, classifier, form):
    model, path = classifier
    session = open_session(exported(path, form, dynamic=("batch",)).path, trust=True)
    for count in (1, 4):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            close(session(images)[0], model.double()(images.double()), "fp32")


@pytest.mark.parametrize("form", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_feature_maps_of_a_rectangle(exported, form):
    session = open_session(exported("test_resnet", form, size=SIZE, features=True).path)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", features_only=True).double().eval()
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        maps = model(images.double())
    found = session(images)
    assert len(found) == len(maps) > 3
    for one, other in zip(found, maps, strict=True):
        close(one, other, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("form", RUNNABLE)
def test_feature_maps_of_ours_at_any_size(exported, form):
    path = exported("lat_nano", form, size=(64, 64), features=True, dynamic=("batch", "size")).path
    session = open_session(path, trust=True)
    torch.manual_seed(0)
    model = timm.create_model("lat_nano", features_only=True).double().eval()
    for size in ((64, 64), (128, 96)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            for one, other in zip(session(images), model(images.double()), strict=True):
                close(one, other, "fp32")


@pytest.mark.parametrize("form", fast(RUNNABLE, "onnx", "torchscript"))
def test_a_runner_of_a_file_finds_what_the_weights_find(exported, tiny, form):
    """Images of other proportions than the file's, one by one and together, through the whole of it."""
    path = exported(tiny, form, size=SIZE, batch=2).path
    images = [np.ascontiguousarray((p.permute(1, 2, 0) * 255).byte().numpy()) for p in pictures(3, (80, 70))]
    ours = load_runner(path, "cpu", conf=0.2, trust=True)
    assert (ours.size, ours.names, ours.task) == (SIZE, CLASSES, "detect")
    theirs = load_runner(tiny, "cpu", SIZE, conf=0.2)(images)
    for found in (ours(images), [ours([image])[0] for image in images]):
        for one, other in zip(found, theirs, strict=True):
            assert len(other.scores) > 3
            np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
            np.testing.assert_array_equal(one.classes, other.classes)


def of_onnx(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def of_openvino(path):
    assert {file.name for file in path.iterdir()} == {"model.xml", "model.bin", "metadata.yaml"}
    sidecar = yaml.safe_load((path / "metadata.yaml").read_text())
    inside = openvino.Core().read_model(path / "model.xml").get_rt_info(["visionattn"]).astype(str)
    assert json.loads(inside) == json.loads(sidecar["visionattn"])
    return sidecar


def of_torchscript(path):
    extra = {"config.txt": ""}
    torch.jit.load(str(path), _extra_files=extra)
    return json.loads(extra["config.txt"])


def of_pt2(path):
    extra = {"visionattn": ""}
    torch.export.load(str(path), extra_files=extra)
    return extra


READERS = {"onnx": of_onnx, "openvino": of_openvino, "torchscript": of_torchscript, "pt2": of_pt2}


@pytest.mark.parametrize("form", RUNNABLE)
def test_what_a_file_tells_the_tools_of_its_format(exported, tiny, form):
    done = exported(tiny, form, size=SIZE, batch=2)
    metadata = READERS[form](done.path)
    own = json.loads(metadata["visionattn"])
    expected = {
        "task": "detect",
        "names": {str(index): name for index, name in CLASSES.items()},
        "size": list(SIZE),
        "batch": 2,
        "stride": STRIDE,
        "precision": "fp32",
        "dynamic": [],
        "nms": "none",
        "model": str(tiny),
        "opset": 18 if FORMATS[form].of_onnx else None,
    }
    assert {key: own[key] for key in expected} == expected
    assert {"date", "command", "commit", "device", "versions"} <= set(own["environment"])
    assert own["environment"]["versions"]["torch"] == version("torch")
    if form != "pt2":  # as Ultralytics reads it
        names = metadata["names"]
        names = yaml.safe_load(names) if isinstance(names, str) else names
        assert {int(index): name for index, name in names.items()} == CLASSES
        assert (str(metadata["imgsz"]), str(metadata["stride"])) == (str(list(SIZE)), str(STRIDE))
    assert open_session(done.path, trust=True).info == done.info


def test_graphs_name_inputs_outputs_and_axes(exported, tiny):
    def shape(value):
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    graph = onnx.load(exported(tiny, "onnx", size=SIZE, dynamic=("batch", "size")).path).graph
    assert [(v.name, shape(v)) for v in graph.input] == [("images", ["batch", 3, "height", "width"])]
    assert [(v.name, shape(v)) for v in graph.output] == [("output0", ["batch", 7, "anchors"])]
    model = onnx.load(exported(tiny, "onnx", size=SIZE, batch=2, precision="fp16").path)
    assert [shape(v) for v in model.graph.input] == [[2, 3, *SIZE]]
    kinds = {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert kinds == {onnx.TensorProto.FLOAT}
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    kinds = [i.data_type for i in model.graph.initializer if i.name in weights]
    assert len(kinds) > 20
    assert sorted(kinds)[:2] == [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16]  # one decodes boxes
    assert [(entry.domain, entry.version) for entry in model.opset_import if not entry.domain] == [("", 18)]


STOCK = {"onnx": (0.05, 1e-4), "torchscript": (0.05, 1e-4), "openvino": (1.0, 0.02)}
"""Pixels and scores. Stock OpenVINO computes in bfloat16 on processors that can; ours never does unasked."""


@pytest.mark.parametrize("form", fast(STOCK, "onnx"))
def test_stock_ultralytics_finds_the_same_boxes(exported, tiny, form):
    done = exported(tiny, form, size=SIZE, dynamic=("batch", "size"))
    image = np.ascontiguousarray((pictures(1, (64, 64))[0].permute(1, 2, 0) * 255).byte().numpy())
    ours = load_runner(done.path, "cpu", (64, 64), conf=0.3, trust=True)([image])[0]
    model = YOLO(done.path, task="detect")
    theirs = model.predict(image, conf=0.3, device="cpu", verbose=False, save=False, imgsz=64)[0].boxes
    pixels, scores = STOCK[form]
    sure = int((ours.scores > 0.3 + scores).sum())  # others may be on either side of the threshold
    assert sure > 3
    assert (theirs.conf[sure:] < 0.3 + 2 * scores).all()
    np.testing.assert_allclose(theirs.xyxy[:sure].numpy(), ours.boxes[:sure], atol=pixels)
    np.testing.assert_allclose(theirs.conf[:sure].numpy(), ours.scores[:sure], atol=scores)
    np.testing.assert_array_equal(theirs.cls[:sure].numpy(), ours.classes[:sure])
    assert dict(model.names) == CLASSES


def constants(path):
    return {entry.name: entry.SerializeToString() for entry in onnx.load(path).graph.initializer}


@pytest.mark.slow
@pytest.mark.parametrize("attention", RANDOM)
def test_two_exports_have_the_same_constants(tmp_path, attention):
    """Random features too: they are buffers of the weights, drawn once, and nothing of them is drawn in the graph."""
    for name in ("a", "bc"):
        torch.manual_seed(len(name))
        kwargs = {"attn_layer": attention, "depth": 1}
        export(Request("test_vit", model_kwargs=kwargs), "onnx", tmp_path / f"{name}.onnx")
    one, other = constants(tmp_path / "a.onnx"), constants(tmp_path / "bc.onnx")
    assert len(one) > 10
    assert one == other
    assert not [node for node in onnx.load(tmp_path / "a.onnx").graph.node if "Random" in node.op_type]


@pytest.mark.slow
def test_two_processes_write_the_same_constants(tmp_path):
    """Weights of a name are drawn from a seed."""
    code = (
        "import sys; from pathlib import Path; from visionattn.deployment.export import export;"
        "from visionattn.deployment.network import Request;"
        "export(Request('test_vit', model_kwargs={'attn_layer': 'performer'}), 'onnx', Path(sys.argv[1]))"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, tmp_path / f"{name}.onnx"], check=True, capture_output=True)
    assert constants(tmp_path / "a.onnx") == constants(tmp_path / "b.onnx")


@pytest.mark.parametrize("attention", RANDOM)
def test_weights_of_random_features_are_loaded_without_trust(tmp_path, attention):
    network = load_network(Request(str(make_detector(tmp_path, attention=attention)), (32, 32)))
    images = pictures(1, (32, 32))
    truth = raw_truth(network.info.model, images)
    torch.testing.assert_close(network.module(images).double(), truth, rtol=1e-4, atol=1e-3)


class TestNames:
    @pytest.mark.parametrize("form", FORMATS)
    def test_a_name_that_ends_like_no_file_of_the_format(self, tmp_path, form):
        with pytest.raises(ConfigError, match=f"names of {form} end in {FORMATS[form].suffix}"):
            export(Request("test_vit"), form, tmp_path / "model.bin")
        assert not list(tmp_path.iterdir())

    def test_a_name_that_another_format_is_found_by(self, tmp_path):
        """An .rtx.engine ends in .engine too."""
        with pytest.raises(ConfigError, match=r"names of tensorrt end in \.engine"):
            export(Request("test_vit"), "tensorrt", tmp_path / "model.rtx.engine")

    @pytest.mark.parametrize("form", FORMATS)
    def test_where_a_file_goes_unless_told(self, form):
        suffix = FORMATS[form].suffix
        named = Request("vit_tiny_patch16_224.augreg_in21k", precision="int8")
        assert default_path(named, FORMATS[form]) == Path(f"runs/export/vit_tiny_patch16_224.augreg_in21k-int8{suffix}")
        for weights in ("/a/b/c.pt", "/a/b/c.safetensors"):
            assert default_path(Request(weights), FORMATS[form]) == Path(f"/a/b/c{suffix}")
        half = Request("/a/b/c.pt", precision="fp16")
        assert default_path(half, FORMATS[form]) == Path(f"/a/b/c-fp16{suffix}")
        assert default_path(Request("test_vit"), FORMATS[form]) == Path(f"runs/export/test_vit{suffix}")

    def test_beside_the_weights(self, tmp_path):
        weights = make_detector(tmp_path)
        before = set(tmp_path.iterdir())
        done = export(Request(str(weights), SIZE), "torchscript")
        assert done.path == tmp_path / "tiny.torchscript"
        assert set(tmp_path.iterdir()) - before == {done.path}

    @pytest.mark.slow
    def test_an_older_file_or_folder_is_replaced(self, tiny, tmp_path):
        file, folder = tmp_path / "m.torchscript", tmp_path / "m_openvino_model"
        file.write_text("old")
        export(Request(str(tiny), SIZE), "torchscript", file)
        assert file.stat().st_size > 1000
        folder.mkdir()
        (folder / "old.xml").write_text("old")
        export(Request(str(tiny), SIZE), "openvino", folder)
        assert not (folder / "old.xml").exists()
        assert set(tmp_path.iterdir()) == {file, folder}

    def test_a_folder_where_a_file_should_be_stays(self, tiny, tmp_path):
        (tmp_path / "m.torchscript").mkdir()
        with pytest.raises(ConfigError, match="of another kind"):
            export(Request(str(tiny), SIZE), "torchscript", tmp_path / "m.torchscript")
        assert [path.name for path in tmp_path.iterdir()] == ["m.torchscript"]


def test_what_an_export_returns(exported, tiny):
    done = exported(tiny, "onnx", size=SIZE, dynamic=("batch", "size"))
    tried = {(error.batch, error.size) for error in done.parity.errors}
    assert tried == {(8, SIZE), (1, SIZE), (1, (64, 128)), (2, (32, 48)), (1, (32, 48))}
    assert {error.part for error in done.parity.errors} == {"boxes", "scores", "score logits"}
    assert (done.why, done.peak, done.kept) == ("", None, [])
    half = exported(tiny, "onnx", size=SIZE, batch=2, precision="fp16")
    assert 0 < half.peak[1] < 65504
    assert set(inspect.signature(type(done)).parameters) == set(vars(done))
