"""Verification finds what is wrong with a file, and nothing is left of it."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.deployment.conftest import SIZE, pictures, raw_truth
from visionattn.deployment.export import export
from visionattn.deployment.formats import FORMATS
from visionattn.deployment.info import ModelInfo
from visionattn.deployment.network import Request
from visionattn.deployment.parity import TOLERANCE, Error, Parity, errors_of
from visionattn.deployment.session import Session
from visionattn.deployment.verify import compare, half_range, photographs, trials_of
from visionattn.detection import NMS
from visionattn.errors import ExportError, ParityError


@pytest.fixture
def forge(monkeypatch, exported, tiny, tmp_path):
    """Export again, by a writer that forges a good file; returns the folder and the error."""

    def run(change, kind=ParityError, **options):
        good = exported(tiny, "onnx", size=SIZE, batch=2).path

        def write(graph, path):
            model = onnx.load(good)
            change(model)
            for entry in model.metadata_props:
                if entry.key == "visionattn":
                    entry.value = graph.info.model_dump_json()
            onnx.save(model, path)

        monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=write))
        older = tmp_path / "model.onnx"
        older.write_bytes(b"older")
        with pytest.raises(kind) as caught:
            export(Request(str(tiny), SIZE, **({"batch": 2} | options)), "onnx", older)
        assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
        assert older.read_bytes() == b"older"
        return str(caught.value)

    return run


def appended(model, *nodes):
    """Let nodes that read ``before`` and write ``output0`` follow the graph."""
    for node in model.graph.node:
        node.output[:] = ["before" if name == "output0" else name for name in node.output]
    model.graph.node.extend(nodes)


def test_a_forger_who_changes_nothing_is_not_found(forge):
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        forge(lambda model: None)


def test_a_weight_that_differs(forge):
    def change(model):
        last = [i for i in model.graph.initializer if len(i.dims) == 4][-1]
        values = numpy_helper.to_array(last).copy()
        values.flat[0] += 0.5 * np.abs(values).max() + 0.1
        last.CopyFrom(numpy_helper.from_array(values, last.name))

    message = forge(change)
    assert "model.onnx: " in message
    assert "accepted for fp32: 0.0001. " in message
    assert message.endswith("Nothing was written")


def test_classes_in_another_order(forge):
    def change(model):
        order = numpy_helper.from_array(np.array([0, 1, 2, 3, 5, 4, 6]), "order")
        model.graph.initializer.append(order)
        appended(model, helper.make_node("Gather", ["before", "order"], ["output0"], axis=1))

    assert "score" in forge(change)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_none(forge, number):
    def change(model):
        odd = np.zeros((1, 7, 1), np.float32)
        odd[0, 6] = number
        model.graph.initializer.append(numpy_helper.from_array(odd, "odd"))
        appended(model, helper.make_node("Add", ["before", "odd"], ["output0"]))

    assert ("nan" if np.isnan(number) else "inf") in forge(change)


def test_outputs_of_another_shape(forge):
    def change(model):
        appended(model, helper.make_node("Transpose", ["before"], ["output0"], perm=[0, 2, 1]))
        shape = model.graph.output[0].type.tensor_type.shape.dim
        shape[1].dim_value, shape[2].dim_value = shape[2].dim_value, shape[1].dim_value

    message = forge(change)
    assert "from the file" in message
    assert "from the weights" in message


@pytest.mark.parametrize("dynamic", [("size",), ("batch",), ("batch", "size")])
def test_a_size_or_batch_that_is_baked_in(forge, dynamic):
    """The file says that it takes any, and takes one alone."""
    message = forge(lambda model: None, dynamic=dynamic)
    assert "the file does not take " in message


def test_a_file_that_no_runtime_reads(monkeypatch, tiny, tmp_path):
    write = lambda graph, path: path.write_bytes(b"nonsense")  # noqa: E731
    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=write))
    with pytest.raises(Exception, match="damaged"):
        export(Request(str(tiny), SIZE), "onnx", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_writer_that_fails(monkeypatch, tiny, tmp_path):
    def write(graph, path):
        path.write_bytes(b"half of it")
        raise RuntimeError("the writer broke")

    monkeypatch.setitem(FORMATS, "pt2", replace(FORMATS["pt2"], write=write))
    with pytest.raises(ExportError, match=r"pt2: .*tiny.pt cannot be written: RuntimeError: the writer broke"):
        export(Request(str(tiny), SIZE), "pt2", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_check_that_refuses(tiny, tmp_path):
    """It gets the weights and the file, which has another name yet and goes when it raises."""
    seen = []

    def check(truth, file):
        (partial,) = tmp_path.iterdir()
        seen.append((partial.name.startswith("."), [path.name for path in partial.iterdir()]))
        images = pictures(2, SIZE)
        torch.testing.assert_close(truth(images)[0], raw_truth(tiny, images).float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(file(images)[0], truth(images)[0], rtol=1e-4, atol=1e-4)
        raise ParityError("no")

    with pytest.raises(ParityError, match="no"):
        export(Request(str(tiny), SIZE), "torchscript", tmp_path / "model.torchscript", check=check)
    assert seen == [(True, ["model.torchscript"])]
    assert not list(tmp_path.iterdir())


class Fake(Session):
    """A file that computes what a function says."""

    def __init__(self, info, function):
        super().__init__(info, "fake")
        self.function, self.shapes = function, []

    def run(self, images):
        self.shapes.append(tuple(images.shape))
        return self.function(images)


def info(**more):
    return ModelInfo(**({"task": "classify", "names": {}, "size": (32, 64), "stride": 16} | more))


class TestErrors:
    def test_are_those_of_the_definition(self):
        truth, found = torch.tensor([[1.0, -4.0]]), torch.tensor([[1.1, -4.4]])
        (error,) = errors_of([truth], [found], info())
        assert error.part == "logits"
        assert error.absolute == pytest.approx(0.4, rel=1e-6)
        assert error.relative == pytest.approx(0.4 / 4, rel=1e-6)
        assert error.rms == pytest.approx(np.sqrt(0.01 + 0.16) / np.sqrt(17), rel=1e-6)

    def test_of_a_detector_are_told_by_part(self):
        truth = torch.cat((torch.full((1, 4, 5), 100.0), torch.full((1, 2, 5), 0.25)), 1)
        found = truth.clone()
        found[0, 1, 2] += 1
        found[0, 5, 0] += 0.125
        boxes, scores, logits = errors_of([truth], [found], info(task="detect", names={0: "a", 1: "b"}))
        assert (boxes.part, boxes.relative, scores.part, scores.relative) == ("boxes", 0.01, "scores", 0.125)
        expected = (np.log(0.375 / 0.625) - np.log(0.25 / 0.75)) / -np.log(0.25 / 0.75)
        assert (logits.part, logits.relative) == ("score logits", pytest.approx(expected, rel=1e-5))

    def test_small_scores_count_by_their_logits(self):
        """For AP it matters whether a score is 0.002 or a twentieth more; as a probability the two are alike."""
        truth = torch.full((1, 5, 8), 0.002)
        found = truth.clone()
        found[:, 4] += 0.00005
        errors = errors_of([truth], [found], info(task="detect", names={0: "a"}))
        assert [error.relative < 1e-4 for error in errors] == [True, True, False]
        with pytest.raises(ParityError, match="score logits"):
            Parity("fp32", errors).check("file")

    def test_of_every_map(self):
        maps = [torch.ones(1, 2, 4, 4), torch.ones(1, 2, 2, 2)]
        first, second = errors_of(maps, [maps[0], maps[1] * 1.5], info(task="features"))
        assert (first.part, first.relative, second.part, second.relative) == ("map0", 0, "map1", 0.5)

    @pytest.mark.parametrize("found", [torch.ones(1, 3), torch.ones(2, 2)])
    def test_of_other_shapes(self, found):
        with pytest.raises(ParityError, match=r"got \(\d, \d\) from the file, \(1, 2\) from the weights"):
            errors_of([torch.ones(1, 2)], [found], info())


ROWS = [[10.0, 10, 50, 50, 0.9, 0], [60, 10, 90, 40, 0.6, 1], [10, 60, 40, 90, 0.5, 1]]


class TestDetections:
    @staticmethod
    def of(rows, nms: NMS = "embedded"):
        found = torch.zeros(1, 6, 6)
        found[0, : len(rows)] = torch.tensor(rows)
        truth = torch.zeros(1, 6, 6)
        truth[0, :3] = torch.tensor(ROWS)
        (error,) = errors_of([truth], [found], info(task="detect", nms=nms))
        return error

    def test_the_order_does_not_matter(self):
        error = self.of(ROWS[::-1])
        assert (error.part, error.absolute, error.relative) == ("detections", 0, 0)

    @pytest.mark.parametrize(("column", "change"), [(0, 3.0), (0, 0.1), (4, 0.1), (4, 0.002), (5, 1.0)])
    def test_a_box_that_is_elsewhere_less_likely_or_another_thing(self, column, change):
        rows = [list(row) for row in ROWS]
        rows[1][column] += change
        scores = sum(row[4] for row in rows) + 2.0
        error = self.of(rows)
        assert error.relative == pytest.approx((rows[1][4] + 0.6) / scores, rel=1e-5)
        assert error.absolute == 0

    @pytest.mark.parametrize(("column", "change"), [(0, 0.02), (4, 0.0005)])
    def test_a_box_that_differs_by_rounding(self, column, change):
        rows = [list(row) for row in ROWS]
        rows[1][column] += change
        error = self.of(rows)
        assert error.relative == 0
        assert error.absolute == pytest.approx(change if column == 4 else 0, abs=1e-6)

    def test_a_box_that_is_missing(self):
        assert self.of(ROWS[:1]).relative == pytest.approx(1.1 / 2.9, rel=1e-6)

    def test_a_box_too_many(self):
        """As from a suppression that leaves all boxes of a thing."""
        assert self.of([*ROWS, ROWS[0]]).relative == pytest.approx(0.9 / 4.9, rel=1e-6)

    def test_a_number_that_is_none(self):
        rows = [list(row) for row in ROWS]
        rows[2][1] = float("nan")
        error = self.of(rows)
        with pytest.raises(ParityError):
            Parity("fp32", [error]).check("file")

    def test_nothing_to_compare(self):
        with pytest.raises(ParityError, match=r"cannot be compared: the weights find none .*--nms none"):
            errors_of([torch.full((1, 4, 6), 0.0009)], [torch.zeros(1, 4, 6)], info(task="detect", nms="free"))


class TestParity:
    def test_what_is_accepted(self):
        """Figures that the documentation states."""
        assert TOLERANCE == {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.15}

    @pytest.mark.parametrize("precision", TOLERANCE)
    def test_the_largest_error_counts(self, precision):
        limit = TOLERANCE[precision]
        kind = "rms" if precision == "int8" else "relative"

        def error(value):
            return Error(**({"part": "logits", "absolute": 0, "relative": 0, "rms": 0} | {kind: value}))

        Parity(precision, [error(limit), error(0)]).check("file")
        for value in (limit * 1.01, float("nan"), float("inf")):
            parity = Parity(precision, [error(0), error(value), error(0)])
            with pytest.raises(ParityError, match=r"^file: logits of a batch of 0"):
                parity.check("file")

    def test_other_kinds_of_error_do_not_count(self):
        Parity("int8", [Error(part="x", absolute=9, relative=9, rms=0)]).check("file")
        Parity("fp32", [Error(part="x", absolute=9, relative=0, rms=9)]).check("file")


class TestTrials:
    def test_what_is_fixed_is_tried_as_it_is(self):
        """More images than a batch, so that they are split, and one, so that it is filled up."""
        assert trials_of(info(batch=4)) == [(8, (32, 64)), (1, (32, 64))]
        assert trials_of(info(batch=10)) == [(11, (32, 64)), (1, (32, 64))]

    @pytest.mark.parametrize("size", [(32, 32), (32, 64), (96, 160), (240, 48)])
    def test_what_is_dynamic_is_tried_apart(self, size):
        trials = trials_of(info(size=size, dynamic=("batch", "size")))
        sizes = {size for _, size in trials}
        assert {batch for batch, _ in trials} == {1, 2, 8}
        assert len(sizes) == (2 if size == (32, 32) else 3)
        assert any(h != w for h, w in sizes)
        assert all(side % 16 == 0 and side >= 32 for pair in sizes for side in pair)
        assert size in sizes

    def test_a_file_is_compared_at_all_of_them(self, tiny):
        from visionattn.deployment.network import load_network

        network = load_network(Request(str(tiny), SIZE, dynamic=("batch", "size")))
        session = Fake(network.info, lambda images: [network.truth(images)])
        parity = compare(network, session, photographs)
        assert parity.worst.relative == 0
        assert [(shape[0], shape[2:]) for shape in session.shapes] == trials_of(network.info)
        wrong = Fake(network.info, lambda images: [network.truth(images) * (1.01 if images.shape[2] == 32 else 1)])
        assert compare(network, wrong, photographs).worst.size == (32, 48)


def test_the_truth_is_that_of_the_bare_module(tiny):
    from visionattn.deployment.network import load_network

    network = load_network(Request(str(tiny), SIZE, precision="fp16"))
    images = pictures(2, SIZE)
    truth = network.truth(images).double()
    torch.testing.assert_close(truth, raw_truth(tiny, images), rtol=1e-4, atol=1e-4)


class TestPhotographs:
    @pytest.mark.parametrize("size", [(64, 64), (32, 160), (160, 32)])
    def test_are_pieces_that_differ(self, size):
        found = photographs(info(task="detect"), 4, size)
        assert found.shape == (4, 3, *size)
        assert (found.min() >= 0, found.max() <= 1, found.std() > 0.1) == (True, True, True)
        assert len({image.numpy().tobytes() for image in found}) == 4
        torch.testing.assert_close(found, photographs(info(task="detect"), 4, size), rtol=0, atol=0)


class TestHalfRange:
    """A product of float16 matrices that overflows, then is scaled down."""

    @staticmethod
    def graph(path, weight, scale):
        half = TensorProto.FLOAT16
        nodes = [
            helper.make_node("Cast", ["images"], ["half"], to=half),
            helper.make_node("MatMul", ["half", "weight"], ["product"]),
            helper.make_node("Mul", ["product", "scale"], ["scaled"]),
            helper.make_node("Cast", ["scaled"], ["output0"], to=TensorProto.FLOAT),
        ]
        images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 4, 4])
        output = helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 3, 4, 4])
        constants = [
            numpy_helper.from_array(np.full((4, 4), weight, np.float16), "weight"),
            numpy_helper.from_array(np.array(scale, np.float16), "scale"),
        ]
        made = helper.make_graph(nodes, "g", [images], [output], constants)
        onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
        return path

    def test_an_overflow_that_the_output_hides_is_found(self, tmp_path):
        file, images = self.graph(tmp_path / "g.onnx", 30000, 0.001), torch.ones(1, 3, 4, 4)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        hidden = session.run(None, {"images": images.numpy()})[0]
        assert np.isfinite(hidden).all()  # in float32; in float16 it would be infinite
        name, peak = half_range(file, images)
        assert (name, peak) == ("product", np.inf)

    def test_the_largest_is_named(self, tmp_path):
        name, peak = half_range(self.graph(tmp_path / "g.onnx", 1000, 0.001), torch.ones(1, 3, 4, 4))
        assert (name, peak) == ("product", 4000)
        name, peak = half_range(self.graph(tmp_path / "g.onnx", -10, 100), torch.ones(1, 3, 4, 4))
        assert (name, peak) == ("scaled", 4000)

    def test_an_export_that_overflows_is_refused(self, tmp_path, monkeypatch):
        """Logits beyond the range of float16, although the file computes them well on this machine."""
        import timm

        class Loud(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = timm.create_model("test_vit", depth=1, num_classes=3)
                self.feature_info = self.inner.feature_info
                self.num_classes = 3
                self.pretrained_cfg = self.inner.pretrained_cfg
                with torch.no_grad():
                    self.inner.head.weight.mul_(1e5 / self.inner(torch.ones(1, 3, 160, 160)).abs().max())

            def forward(self, images):
                return self.inner(images) * 1e-3

        monkeypatch.setattr("visionattn.deployment.network.create_model", lambda *_: Loud())
        output = tmp_path / "loud.onnx"
        with pytest.raises(ParityError, match=r"^loud.onnx: \S+ overflows float16 on photographs; export it in fp32"):
            export(Request("test_vit", precision="fp16"), "onnx", output)
        assert not list(tmp_path.iterdir())
        export(Request("test_vit"), "onnx", output)
