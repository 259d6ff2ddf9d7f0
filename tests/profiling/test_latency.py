import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.deployment.conftest import make_detector, pictures
from visionattn.deployment.export import export
from visionattn.deployment.network import Request
from visionattn.deployment.quantize import Calibration
from visionattn.errors import ConfigError, WeightsError
from visionattn.profiling import RUNTIMES, Conditions, LatencyReport, Sweep, measure_latency, runtimes
from visionattn.profiling.clock import WARM_UP
from visionattn.profiling.runtimes import TRAINING
from visionattn.profiling.steps import ACCEPTED, Attempt, TrainingStep
from visionattn.profiling.tables import latency_grids

CPU = Conditions(torch.device("cpu"))
ON_CPU = [name for name, kinds in RUNTIMES.items() if "cpu" in kinds]
SIZE = (64, 64)


@pytest.fixture(scope="module")
def yolo(tmp_path_factory):
    """A detector of two levels and one attention, whose outputs vary."""
    return str(make_detector(tmp_path_factory.mktemp("yolo")))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Conditions that allow int8."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, picture in enumerate(pictures(8, SIZE)):
        Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"{index}.png")
    return replace(CPU, calibration=Calibration(tuple(sorted(folder.iterdir())), math.inf))


@pytest.fixture(scope="module")
def onnx_file(yolo, tmp_path_factory):
    """That detector as an ONNX file of a fixed size and batch."""
    return str(export(Request(yolo, SIZE), "onnx", tmp_path_factory.mktemp("onnx") / "tiny.onnx").path)


def rows_of(*models, conditions=CPU, **options):
    return measure_latency(Sweep(models, **{"rounds": 1, "sizes": [SIZE], **options}), conditions).rows


@pytest.mark.parametrize(
    ("model", "names"),
    [
        pytest.param("test_vit", ON_CPU, marks=pytest.mark.slow),
        ("yolo", ["torch", "torch-bf16", "torch-channels-last", "onnxruntime"]),
    ],
)
def test_every_runtime_of_the_cpu(model, names, yolo, calibrated):
    model = yolo if model == "yolo" else model
    report = measure_latency(Sweep([model], runtimes=names, sizes=[SIZE], rounds=1), calibrated)
    assert [(row.model, row.runtime) for row in report.rows] == [(model, name) for name in names]
    for row in report.rows:
        assert row.reason == ""
        assert row.forward.median > 0
        assert row.end_to_end.p95 >= row.end_to_end.p5 > 0
        assert (row.device, row.size, row.batch, row.peak_memory, row.train) == ("cpu", SIZE, 1, None, None)
        assert row.precision == {"torch-bf16": "bf16"}.get(row.runtime, "int8" if "int8" in row.runtime else "fp32")
        assert row.error is None if row.precision == "int8" else row.error <= ACCEPTED[row.precision]
        assert row.parameters > 10_000
    assert LatencyReport.model_validate_json(report.model_dump_json()) == report
    text = latency_grids(report)[0].markdown()
    assert "torch-channels-last" in text
    assert "training step" not in text  # nothing stands there


def test_torch_in_bfloat16_rounds(yolo):
    half, full = rows_of(yolo, runtimes=["torch-bf16", "torch"])[::-1]
    assert full.error < 1e-5
    assert 1e-4 < half.error < ACCEPTED["bf16"]


@pytest.mark.parametrize(
    ("device", "name", "message"),
    [
        ("cpu", "torch-graph", "does not run on cpu; accepted there: torch, torch-compiled"),
        ("cuda", "openvino", "does not run on cuda; accepted there: torch, torch-compiled, torch-graph"),
        ("cpu", "onnx", "nearest: onnxruntime"),
        ("cpu", "openvino-int8", "needs images to calibrate by"),
    ],
)
def test_a_bad_runtime(device, name, message):
    with pytest.raises(ConfigError, match=message):
        runtimes.known_runtimes([name], Conditions(torch.device(device)))


def test_bad_wishes(yolo, onnx_file):
    with pytest.raises(ConfigError, match="precision fp16 is for torch on a GPU"):
        replace(CPU, precision="fp16")
    with pytest.raises(ConfigError, match="got 1 models, 0 rounds"):
        Sweep([yolo], rounds=0)
    with pytest.raises(ConfigError, match="--train is for classifiers"):
        rows_of(yolo, train=True)
    with pytest.raises(ConfigError, match="is a finished file"):
        rows_of(onnx_file, attentions=["elu"])
    with pytest.raises(ConfigError, match="is a detector"):
        rows_of(yolo, attentions=["elu"])
    with pytest.raises(WeightsError, match="not found"):
        rows_of("absent.onnx")


def test_exported_file_is_run_by_its_own_runtime_and_compared_with_its_weights(onnx_file):
    (row,) = rows_of(onnx_file, runtimes=["torch-bf16"], batches=[3])
    assert (row.runtime, row.precision, row.parameters, row.reason) == ("onnxruntime", "fp32", None, "")
    assert row.forward.median > 0
    assert row.error <= ACCEPTED["fp32"]


def test_exported_file_of_other_weights_is_not_timed(tmp_path):
    weights = str(make_detector(tmp_path))
    file = export(Request(weights, SIZE), "onnx", tmp_path / "tiny.onnx").path
    make_detector(tmp_path, attention="uniform")
    (row,) = rows_of(str(file))
    assert "differ from those of the weights" in row.reason
    assert row.forward is row.end_to_end is None


def test_exported_file_at_a_size_that_it_does_not_take(onnx_file):
    rows = rows_of(onnx_file, sizes=[(96, 96), SIZE])
    assert "takes (64, 64) only" in rows[0].reason
    assert rows[1].reason == ""


def test_sweep_is_the_product_of_batches_and_sizes_and_attentions():
    sizes = [(32, 32), (32, 64)]
    rows = rows_of("test_vit", sizes=sizes, batches=[1, 2], attentions=["softmax", "elu"], runtimes=["torch"])
    expected = [(s, b, a) for s in sizes for b in (1, 2) for a in ("softmax", "elu")]
    assert [(row.size, row.batch, row.attention) for row in rows] == expected
    assert len(latency_grids(LatencyReport(threads=1, rounds=1, rows=rows))) == 4


def test_own_size_if_none_is_asked_for(yolo):
    assert rows_of("test_vit", sizes=(), runtimes=["torch"])[0].size == (160, 160)


def test_what_fails_is_a_row(monkeypatch):
    whole = runtimes.TunedSession.laid

    def broken(self, images):
        if self.layout == torch.channels_last:
            raise torch.OutOfMemoryError("no space\nat all")
        return whole(self, images)

    monkeypatch.setattr(runtimes.TunedSession, "laid", broken)
    good, bad = rows_of("test_vit", runtimes=["torch", "torch-channels-last"])
    assert (bad.reason, bad.forward) == ("out of memory: no space", None)
    assert good.forward.median > 0


def test_what_fails_in_the_middle_is_a_row(monkeypatch):
    calls = iter(range(100))

    def tiring(self, images):
        if next(calls) > WARM_UP:
            raise RuntimeError("tired")
        return original(self, images)

    original = runtimes.TunedSession.laid
    monkeypatch.setattr(runtimes.TunedSession, "laid", tiring)
    (row,) = rows_of("test_vit", runtimes=["torch"])
    assert row.reason == "RuntimeError: tired"
    assert row.forward is row.end_to_end is None
    assert "RuntimeError: tired" in latency_grids(LatencyReport(threads=1, rounds=1, rows=[row]))[0].markdown()


def test_what_is_wrong_is_not_timed(monkeypatch):
    def wrong(self, images):
        return torch.zeros_like(images)

    monkeypatch.setattr(runtimes.TunedSession, "laid", wrong)
    (row,) = rows_of("test_vit", runtimes=["torch"])
    assert "not timed: logits of a photograph differ" in row.reason
    assert row.forward is None


def test_training_step_beside_inference(yolo):
    rows = rows_of("test_vit", yolo, runtimes=["torch"], train=True, batches=[2])
    assert [row.runtime for row in rows] == ["torch", TRAINING, "torch"]
    assert rows[1].train.median > 0
    assert rows[1].forward is rows[1].end_to_end is rows[0].train is None
    assert rows[1].reason == ""


def test_training_step_is_that_of_sgd():
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(4, 3), torch.randn(5, 4)
    weight = layer.weight.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad((inputs @ weight.T + layer.bias.detach()).square().sum(), weight)
    step = TrainingStep(layer, inputs, lambda output: output.square().sum(), "fp32")
    step()
    torch.testing.assert_close(layer.weight, weight - 1e-4 * gradient)
    assert layer.weight.grad is None
    with pytest.raises(ConfigError, match="scaled"):
        TrainingStep(layer, inputs, torch.sum, "fp16")


def test_an_attempt_ends_itself():
    seen = []

    def call(number):
        seen.append(number)
        return 1 // (2 - number)

    attempt = Attempt(call)
    assert [attempt(number) for number in (1, 2, 3)] == [1, None, None]
    assert seen == [1, 2]
    assert attempt.reason == "ZeroDivisionError: integer division or modulo by zero"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_runtime_of_the_gpu(yolo, precision):
    conditions = Conditions(torch.device("cuda:0"), precision)
    rows = rows_of("test_vit", yolo, conditions=conditions, batches=[1, 2], train=True)
    assert len(rows) == 2 * (4 + 1 + 4)
    for row in rows:
        assert row.reason == ""
        assert row.peak_memory > 0
        assert row.device == torch.cuda.get_device_name(0)
        assert (row.train if row.runtime == TRAINING else row.forward).median > 0
        assert row.precision == ("bf16" if row.runtime == TRAINING else precision)


@pytest.mark.gpu
def test_a_graph_reads_what_it_is_given(yolo):
    conditions = Conditions(torch.device("cuda:0"))
    subject = runtimes.open_subject(yolo, "", conditions)
    network = subject.network(SIZE, 1, "fp32", False)
    images = torch.from_numpy(np.random.default_rng(0).random((2, 1, 3, *SIZE), dtype=np.float32))
    expected = [network.truth(image) for image in images]
    session = runtimes.TunedSession(network, runtimes.Place("cuda:0"), "fp32", False)
    session.capture(session.laid(torch.rand(1, 3, *SIZE)))
    for image, output in zip(images, expected, strict=True):
        torch.testing.assert_close(session(image)[0].cpu(), output, rtol=1e-3, atol=1e-3)
