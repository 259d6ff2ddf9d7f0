"""Int8: the graph really is quantised, by images that do not judge, and what is sensitive stays in float32."""

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import numpy_helper

from tests.deployment.conftest import SIZE, pictures, raw_truth
from visionattn.data import calibration_images, load_image
from visionattn.deployment import quantize
from visionattn.deployment.export import export
from visionattn.deployment.graph import Graph
from visionattn.deployment.network import Request, load_network
from visionattn.deployment.quantize import Calibration, quantize_onnx
from visionattn.deployment.runner import open_session
from visionattn.errors import ConfigError, DataError

HEAVY = ("Conv", "MatMul", "Gemm")


@pytest.fixture(scope="module")
def calibration(photographs_on_disk):
    return Calibration(photographs_on_disk)


@pytest.fixture(scope="module")
def float_graph(tiny, calibration, tmp_path_factory):
    """The graph that is quantised, in float32."""
    request = Request(str(tiny), SIZE, precision="int8")
    graph = Graph(load_network(request), tmp_path_factory.mktemp("float"), calibration)
    assert graph.onnx_file.is_file()
    return graph


class TestCalibration:
    def test_images_that_judge_set_no_range(self, calibration, float_graph):
        judges, images = calibration.judges, calibration.images
        assert (len(images), len(judges)) == (16, 4)
        info = float_graph.info
        inputs = np.concatenate(list(calibration.inputs(info)))
        assert inputs.shape == (12, 3, *SIZE)
        judging = calibration.judging(info, 6, SIZE).numpy()
        assert judging.shape == (6, 3, *SIZE)
        assert not {image.tobytes() for image in inputs} & {image.tobytes() for image in judging}
        np.testing.assert_array_equal(judging[4:], judging[:2])  # there are but four

    def test_batches_are_full(self, calibration, float_graph):
        batches = list(calibration.inputs(float_graph.info.updated(batch=5)))
        assert [batch.shape[0] for batch in batches] == [5, 5, 5]
        np.testing.assert_array_equal(batches[2][2:], batches[0][:3])
        assert len(list(calibration.inputs(float_graph.info, limit=7))) == 7

    def test_inputs_are_the_images(self, calibration, float_graph):
        """Letterboxed; a picture of 96 x 128 fits a network of 64 x 96 in with grey at both sides."""
        first = next(calibration.inputs(float_graph.info))[0]
        image = load_image(calibration.images[0])
        assert image.shape == (96, 128, 3)
        grey = np.float32(114 / 255)
        assert (first[:, :, 0] == grey).all()
        assert (first[:, :, -1] == grey).all()
        assert first[0, :, 6:-6].mean() == pytest.approx(image[..., 2].mean() / 255, abs=0.02)

    @pytest.mark.parametrize("count", [0, 7])
    def test_too_few_images(self, photographs_on_disk, count):
        with pytest.raises(ConfigError, match=f"got {count} images, expected 8 or more"):
            Calibration(photographs_on_disk[:count])


def inputs_of(model, kinds=HEAVY):
    """Of every heavy node: the kinds of the nodes that give its first two inputs."""
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    return {
        node.name: [makers.get(name) for name in node.input[:2]] for node in model.graph.node if node.op_type in kinds
    }


def zero_points(model):
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    names = [node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return [constants[name] for name in names]


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def relative_rms(found, truth):
    return float(np.sqrt(((found - truth) ** 2).mean() / (truth**2).mean()))


@pytest.fixture(scope="module")
def written(tiny, calibration, tmp_path_factory):
    """An export to ONNX in int8."""
    request = Request(str(tiny), SIZE, precision="int8")
    return export(request, "onnx", tmp_path_factory.mktemp("int8") / "m.onnx", calibration)


def test_every_convolution_and_product_is_quantised(written, tiny):
    model = onnx.load(written.path)
    found = inputs_of(model)
    assert len(found) > 25
    quantised = [name for name, makers in found.items() if makers == ["DequantizeLinear"] * 2]
    assert len(quantised) == len(found) - len(written.kept)
    assert len(quantised) > 20
    names = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    weights = [i for i in model.graph.initializer if i.name in names and len(i.dims) == 4]
    assert weights
    assert {i.data_type for i in weights} == {onnx.TensorProto.INT8}
    kinds = {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert kinds == {onnx.TensorProto.FLOAT}


def test_it_computes_nearly_the_same(written, tiny):
    images = pictures(4, SIZE, seed=9)
    found = open_session(written.path)(images)[0].double().numpy()
    truth = raw_truth(tiny, images).numpy()
    assert 1e-4 < relative_rms(found[:, :4], truth[:, :4]) < 0.15
    assert 1e-4 < relative_rms(found[:, 4:], truth[:, 4:]) < 0.2  # on other images than judged
    assert written.info.precision == "int8"
    assert 1e-4 < written.parity.measured(written.parity.worst) <= 0.15


def test_symmetric_ranges_have_no_offset(float_graph, calibration, tmp_path):
    info, source = float_graph.info, float_graph.onnx_file
    for symmetric in (True, False):
        quantize_onnx(source, tmp_path / f"{symmetric}.onnx", calibration, info, symmetric)
    points = {symmetric: zero_points(onnx.load(tmp_path / f"{symmetric}.onnx")) for symmetric in (True, False)}
    assert len(points[True]) > 20
    assert all((point == 0).all() and point.dtype == np.int8 for point in points[True])
    assert any((point != 0).any() for point in points[False])
    assert {point.dtype for point in points[False]} == {np.dtype(np.uint8)}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Two convolutions: the first bears int8 well; the second reads loud channels too, which it has no weights for."""
    torch.manual_seed(0)
    first, second = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(7, 2, 1)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    with torch.no_grad():
        second.weight[:, 4:] = 0
    nodes = [
        helper.make_node("Conv", ["images", "w1", "b1"], ["quiet"], name="robust", pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["images", "hundred"], ["loud"], name="loudness"),
        helper.make_node("Concat", ["quiet", "loud"], ["both"], name="both", axis=1),
        helper.make_node("Conv", ["both", "w2", "b2"], ["output0"], name="sensitive"),
    ]
    constants = {"w1": first.weight, "b1": first.bias, "w2": second.weight, "b2": second.bias * 0}
    arrays = {name: value.detach().numpy() for name, value in constants.items()} | {"hundred": np.float32([100])}
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("images", kind, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("output0", kind, [1, 2, 32, 32])],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    path = tmp_path_factory.mktemp("chain") / "chain.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


class TestSensitive:
    @staticmethod
    def info():
        return quantize.ModelInfo(task="features", names={}, size=(32, 32), stride=1)

    @pytest.fixture
    def letterboxed(self, monkeypatch):
        """Feature networks go through timm's transform; here a picture is fitted in."""
        from visionattn.detection import letterbox

        monkeypatch.setattr(quantize, "prepare", lambda images, info, size: letterbox(images, size, "cpu"))

    def test_the_worst_alone_stays(self, chain, calibration, letterboxed, tmp_path):
        kept = quantize_onnx(chain, tmp_path / "q.onnx", calibration, self.info(), False)
        assert kept == ["sensitive"]
        found = inputs_of(onnx.load(tmp_path / "q.onnx"))
        assert found["robust"] == ["DequantizeLinear"] * 2
        assert "DequantizeLinear" not in found["sensitive"]
        images = calibration.judging(self.info(), 1, (32, 32))
        assert relative_rms(run(tmp_path / "q.onnx", images), run(chain, images)) <= 0.15

    def test_all_stay_where_nothing_is_accepted(self, chain, photographs_on_disk, letterboxed, tmp_path):
        strict = Calibration(photographs_on_disk, tolerance=1e-9)
        kept = quantize_onnx(chain, tmp_path / "q.onnx", strict, self.info(), False)
        assert kept == ["sensitive", "robust"]
        images = strict.judging(self.info(), 1, (32, 32))
        np.testing.assert_allclose(run(tmp_path / "q.onnx", images), run(chain, images), rtol=1e-5, atol=1e-6)

    def test_none_stays_where_all_is_accepted(self, chain, photographs_on_disk, letterboxed, tmp_path):
        easy = Calibration(photographs_on_disk, tolerance=1e9)
        assert quantize_onnx(chain, tmp_path / "q.onnx", easy, self.info(), False) == []
        assert all(makers == ["DequantizeLinear"] * 2 for makers in inputs_of(onnx.load(tmp_path / "q.onnx")).values())


@pytest.mark.slow
def test_nodes_of_a_detector_stay_by_their_own_error(float_graph, photographs_on_disk, tmp_path):
    """Those that stay are the ones that alone do most harm, and with them the error is small enough."""
    source, info = float_graph.onnx_file, float_graph.info
    easy = Calibration(photographs_on_disk, tolerance=1e9)
    assert quantize_onnx(source, tmp_path / "all.onnx", easy, info, False) == []
    judge = quantize._OnnxJudge(source.with_suffix(".ready.onnx"), easy, info, False)
    wanted = judge.error(tmp_path / "all.onnx", []) / 2
    kept = quantize_onnx(source, tmp_path / "q.onnx", Calibration(photographs_on_disk, wanted), info, False)
    assert 0 < len(kept) < len(judge.nodes)
    images = easy.judging(info, 4, SIZE)
    found, truth = (
        np.concatenate([run(path, image[None]) for image in images]) for path in (tmp_path / "q.onnx", source)
    )
    assert relative_rms(found[:, :4], truth[:, :4]) <= wanted
    assert relative_rms(found[:, 4:], truth[:, 4:]) <= wanted
    assert found.shape == truth.shape
    assert not np.array_equal(found, truth)
    alone = {node: judge._quantized(tmp_path / "one.onnx", [node], judge._inputs[:8]) for node in judge.nodes}
    assert min(alone[node] for node in kept) >= max(error for node, error in alone.items() if node not in kept)


@pytest.fixture(scope="module")
def folder(tiny, calibration, tmp_path_factory):
    """An export to OpenVINO in int8, of any batch."""
    request = Request(str(tiny), SIZE, dynamic=("batch",), precision="int8")
    return export(request, "openvino", tmp_path_factory.mktemp("ov") / "m_openvino_model", calibration)


@pytest.mark.slow
class TestOpenVino:
    def test_activations_and_weights_are_quantised(self, folder):
        model = openvino.Core().read_model(folder.path / "model.xml")
        kinds = [operation.get_type_name() for operation in model.get_ordered_ops()]
        assert kinds.count("FakeQuantize") > 20
        stored = [o for o in model.get_ordered_ops() if o.get_type_name() == "Constant"]
        assert any(o.get_element_type().get_type_name() in ("i8", "u8") and len(o.shape) == 4 for o in stored)

    def test_boxes_are_decoded_in_float(self, folder):
        nodes = openvino.Core().read_model(folder.path / "model.xml").get_ordered_ops()
        followed = set()
        for node in reversed(nodes):
            if (
                node.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")
                or node.get_friendly_name() in followed
            ):
                followed |= {node.get_friendly_name()}
                followed |= {value.get_node().get_friendly_name() for value in node.input_values()}
        after = [node.get_type_name() for node in nodes if node.get_friendly_name() not in followed]
        assert "Concat" in after
        assert "FakeQuantize" not in after

    def test_it_computes_nearly_the_same(self, folder, tiny):
        images = pictures(3, SIZE, seed=9)
        found = open_session(folder.path)(images)[0].double().numpy()
        truth = raw_truth(tiny, images).numpy()
        assert 1e-4 < relative_rms(found[:, :4], truth[:, :4]) < 0.15
        assert 1e-4 < relative_rms(found[:, 4:], truth[:, 4:]) < 0.2


@pytest.mark.slow
def test_an_engine_in_int8(tiny, calibration, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings")
    request = Request(str(tiny), SIZE, precision="int8")
    done = export(request, "tensorrt-rtx", tmp_path / "m.rtx.engine", calibration)
    assert done.path.stat().st_size > 50_000
    assert done.parity.measured(done.parity.worst) <= 0.15


@pytest.mark.slow
def test_a_classifier_of_any_batch(classifier, calibration, tmp_path):
    model, path = classifier
    request = Request(str(path), dynamic=("batch",), precision="int8")
    done = export(request, "onnx", tmp_path / "m.onnx", calibration)
    images = calibration.judging(done.info, 3, (32, 32))
    with torch.no_grad():
        truth = model.double()(images.double()).numpy()
    assert 1e-4 < relative_rms(open_session(done.path)(images)[0].double().numpy(), truth) < 0.2


class TestImages:
    def test_of_an_embedded_set(self):
        images = calibration_images("digits-scenes", 10)
        assert len(set(images)) == 10
        assert all(image.is_file() and image.parent.name == "train" for image in images)
        assert images == calibration_images("digits-scenes", 10)
        assert calibration_images("digits-scenes", 4) == images[:4]
        assert images != tuple(sorted(images))

    def test_of_class_folders(self):
        images = calibration_images("digits", 20)
        assert len(set(images)) == 20
        assert len({image.parent for image in images}) > 3
        assert all("train" in image.parts for image in images)

    def test_of_a_split_and_no_more_than_there_are(self):
        train = calibration_images("digits-scenes", 10**6)
        val = calibration_images("digits-scenes", 10**6, "val")
        assert not set(train) & set(val)
        assert len(set(train)) == len(train) > len(val) > 0

    def test_of_no_set(self, tmp_path):
        with pytest.raises(DataError, match="nothing"):
            calibration_images(str(tmp_path / "nothing"), 8)
