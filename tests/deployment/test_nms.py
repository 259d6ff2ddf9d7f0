"""Suppression inside the graph finds the boxes that torchvision finds, in every runtime; so does an NMS-free head."""

import cv2
import numpy as np
import onnxscript
import pytest
import torch
import yaml
from torchvision.ops import batched_nms

from tests.deployment.conftest import SIZE, description, make_detector, pictures, raw_truth
from visionattn.deployment import load_runner
from visionattn.deployment.export import export
from visionattn.deployment.formats import FORMATS
from visionattn.deployment.network import Request
from visionattn.deployment.nms import EmbeddedNMS, Thresholds
from visionattn.deployment.runner import open_session
from visionattn.detection import DetectionNetwork, load_detector
from visionattn.engine.evaluate import evaluate
from visionattn.errors import ConfigError, ParityError, UnsupportedError

RUNTIMES = ["onnx", pytest.param("openvino", marks=pytest.mark.slow)]


def by_hand(raw, conf, iou, max_det):
    """Of raw predictions (4 + classes, anchors): every class that is likely enough, suppressed class by class."""
    boxes, scores = raw[:4].T, raw[4:].T
    boxes = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), 1)
    place, label = (scores > conf).nonzero(as_tuple=True)
    kept = batched_nms(boxes[place], scores[place, label], label, iou)[:max_det]
    place, label = place[kept], label[kept]
    return torch.cat((boxes[place], scores[place, label][:, None], label[:, None].to(boxes)), 1)


def same(found, truth):
    """Rows of one image are those of the truth, best first, then zeros."""
    assert not found[len(truth) :].any()
    torch.testing.assert_close(found[: len(truth)].double(), truth, rtol=1e-4, atol=2e-3)


class Raw(torch.nn.Module):
    """Gives its input, raw predictions."""

    def forward(self, raw):
        return raw


def random_raw(anchors, classes, batch=1, seed=0):
    """Predictions that overlap a lot, with scores that are all different."""
    rng = torch.Generator().manual_seed(seed)
    raw = torch.rand(batch, 4 + classes, anchors, generator=rng)
    raw[:, :2] *= 100
    raw[:, 2:4] = raw[:, 2:4] * 40 + 10
    scores = torch.linspace(0, 1, batch * classes * anchors + 2)[1:-1]
    raw[:, 4:] = scores[torch.randperm(len(scores), generator=rng)].view(batch, classes, anchors)
    return raw


class TestModule:
    @pytest.mark.parametrize("iou", [0.1, 0.5, 0.7, 1.0])
    @pytest.mark.parametrize("conf", [0.0, 0.3, 0.9])
    def test_is_torchvision(self, conf, iou):
        raw = random_raw(80, 3, batch=2)
        found = EmbeddedNMS(Raw(), Thresholds(conf, iou, 50))(raw)
        assert found.shape == (2, 50, 6)
        for rows, image in zip(found, raw, strict=True):
            truth = by_hand(image, conf, iou, 50)
            assert len(truth) > 0
            same(rows, truth.double())

    @pytest.mark.parametrize("anchors", [1, 7, 20])
    def test_fewer_scores_than_boxes_asked_for(self, anchors):
        raw = random_raw(anchors, 2)
        found = EmbeddedNMS(Raw(), Thresholds(0.0, 0.5, 300))(raw)
        assert found.shape == (1, 300, 6)
        same(found[0], by_hand(raw[0], 0.0, 0.5, 300).double())

    def test_nothing_above_the_threshold(self):
        assert not EmbeddedNMS(Raw(), Thresholds(0.99, 0.5, 10))(random_raw(5, 2) * 0.9).any()

    @pytest.mark.parametrize("numbers", [(-0.1, 0.5, 1), (0.5, 1.1, 1), (0.5, 0.5, 0)])
    def test_thresholds_out_of_range(self, numbers):
        with pytest.raises(ConfigError, match=r"expected 0\.\.1, 0\.\.1, 1 or more"):
            Thresholds(*numbers)


@pytest.mark.parametrize("form", RUNTIMES)
def test_any_batch_and_size(exported, tiny, form):
    """Fewer anchors than boxes asked for, more of them, and none that is likely: grey images."""
    thresholds = Thresholds(0.05, 0.5, 50)
    done = exported(tiny, form, size=SIZE, nms="embedded", thresholds=thresholds, dynamic=("batch", "size"))
    session = open_session(done.path, trust=True)
    counts = []
    for count, size in ((1, (32, 32)), (3, SIZE), (2, (128, 160))):
        images = pictures(count, size, seed=count)
        found = session(images)[0]
        assert found.shape == (count, 50, 6)
        for rows, raw in zip(found, raw_truth(tiny, images), strict=True):
            truth = by_hand(raw, 0.05, 0.5, 50)
            counts.append(len(truth))
            same(rows, truth)
    assert min(counts) < 20 < max(counts) == 50


@pytest.fixture(scope="module")
def shy(tmp_path_factory):
    """A detector that is sure of little: on most images no score is high, on some a few are."""
    folder = tmp_path_factory.mktemp("shy")
    model = load_detector(make_detector(folder))
    for branch in model.model.model[-1].cv3:
        branch[-1].bias.data.fill_(-5.5)
    model.save(folder / "shy.pt")
    return folder / "shy.pt"


@pytest.mark.parametrize("form", RUNTIMES)
def test_images_without_boxes_of_a_fixed_batch(exported, shy, form):
    images = torch.cat((pictures(7, (64, 64)), torch.full((1, 3, 64, 64), 0.5)))
    raws = raw_truth(shy, images)
    best = raws[:, 4:].amax((1, 2)).sort().values
    gap = int((best[1:] - best[:-1]).argmax())
    thresholds = Thresholds(float(best[gap : gap + 2].mean()), 0.5, 20)
    done = exported(shy, form, size=(64, 64), batch=3, nms="embedded", thresholds=thresholds)
    truths = [by_hand(raw, thresholds.conf, 0.5, 20) for raw in raws]
    assert {len(truth) > 0 for truth in truths} == {True, False}
    for rows, truth in zip(open_session(done.path, trust=True)(images)[0], truths, strict=True):
        same(rows, truth)


def test_what_is_baked_in_is_told_and_holds(exported, tiny):
    thresholds = Thresholds(0.3, 0.4, 5)
    done = exported(tiny, "onnx", size=(64, 64), nms="embedded", thresholds=thresholds)
    assert (done.info.nms, done.info.conf, done.info.iou, done.info.max_det) == ("embedded", 0.3, 0.4, 5)
    image = np.ascontiguousarray((pictures(1, (64, 64))[0].permute(1, 2, 0) * 255).byte().numpy())
    with pytest.raises(ConfigError, match=r"boxes of a score up to 0\.3 are cut out of this file"):
        load_runner(done.path, "cpu", conf=0.25)
    found = load_runner(done.path, "cpu", conf=0.3, multi_label=True)([image])[0]
    inputs = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
    truth = by_hand(raw_truth(tiny, inputs)[0], 0.3, 0.4, 5)
    assert 1 < len(truth) <= 5
    np.testing.assert_allclose(found.scores, truth[:, 4], rtol=1e-4)
    np.testing.assert_allclose(found.boxes, truth[:, :4].clamp(0, 64), atol=5e-3)
    fewer = load_runner(done.path, "cpu", conf=float(truth[1, 4]) + 1e-3)([image])[0]
    assert len(fewer.scores) == 1


@pytest.fixture
def labelled(tmp_path):
    """A set of one picture."""
    for folder in ("images/val", "labels/val"):
        (tmp_path / folder).mkdir(parents=True)
    picture = (pictures(1, (64, 64))[0].permute(1, 2, 0) * 255).byte().numpy()
    cv2.imwrite(str(tmp_path / "images/val/0.png"), picture)
    (tmp_path / "labels/val/0.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"val": "images/val", "names": ["ant", "bee", "cat"]}))
    return str(tmp_path / "data.yaml")


def test_a_file_that_leaves_out_boxes_is_not_scored(exported, tiny, labelled):
    done = exported(tiny, "onnx", size=(64, 64), nms="embedded", thresholds=Thresholds(0.3, 0.4, 5))
    with pytest.raises(ConfigError, match=r"boxes of a score up to 0\.3 are cut out of"):
        evaluate(done.path, labelled, device="cpu")
    assert evaluate(done.path, labelled, device="cpu", conf=0.3).images == 1


def test_a_file_that_suppresses_nothing_is_found(tiny, tmp_path, monkeypatch):
    op = onnxscript.opset18

    def translated(boxes, scores, conf, iou):
        return op.Cast(op.Greater(scores, op.Constant(value_floats=[conf])), to=1)

    translation = {torch.ops.visionattn.survivors.default: translated}
    monkeypatch.setattr("visionattn.deployment.graph.onnx_translation", lambda: translation)
    request = Request(str(tiny), SIZE, nms="embedded", thresholds=Thresholds(0.001, 0.5, 300))
    with pytest.raises(ParityError, match=r"m\.onnx: detections of"):
        export(request, "onnx", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["torchscript", "tensorrt-rtx"])
def test_formats_that_cannot_hold_a_suppression(tiny, tmp_path, form):
    with pytest.raises(UnsupportedError, match=f"{form} has no operation for nms=embedded; use none, free or peaks"):
        export(Request(str(tiny), SIZE, nms="embedded"), form, tmp_path / f"m{FORMATS[form].suffix}")
    assert not list(tmp_path.iterdir())


def free_by_hand(weights, images):
    """Of the head that needs no suppression: the best 300 scores of all classes and anchors, and their boxes."""
    model = load_detector(weights).model.double().eval()
    model.model[-1].end2end = True
    with torch.no_grad():
        return model(images.double())[0]


class TestFreeHead:
    @pytest.mark.parametrize("form", ["onnx", pytest.param("openvino", marks=pytest.mark.slow), "torchscript"])
    def test_boxes_are_those_of_the_module(self, exported, tiny_free, form):
        done = exported(tiny_free, form, size=SIZE, nms="free", batch=2)
        images = pictures(3, SIZE)
        found, truth = open_session(done.path, trust=True)(images)[0], free_by_hand(tiny_free, images)
        assert found.shape == truth.shape
        assert truth.shape[-1] == 6
        assert (truth[..., 4] > 0.3).sum() > 10
        for rows, others in zip(found.double(), truth, strict=True):
            likely = others[:, 4] > 0.05
            torch.testing.assert_close(rows[likely], others[likely], rtol=1e-4, atol=2e-3)

    def test_its_other_head_is_suppressed_as_usual(self, exported, tiny_free):
        done = exported(tiny_free, "torchscript", size=SIZE)
        images = pictures(2, SIZE)
        raw = raw_truth(tiny_free, images)
        assert raw.shape[1] == 7
        torch.testing.assert_close(open_session(done.path, trust=True)(images)[0].double(), raw, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("nms", ["free", "peaks"])
    def test_a_detector_without_such_a_head(self, tiny, tmp_path, nms):
        with pytest.raises(UnsupportedError, match=r"no NMS-free head \(end2end: true in its yaml\); use none"):
            export(Request(str(tiny), SIZE, nms=nms), "onnx", tmp_path / "m.onnx")

    @pytest.mark.parametrize(
        ("form", "sizes"),
        [
            ("onnx", [SIZE, (128, 160)]),
            *(pytest.param(form, [SIZE], marks=pytest.mark.slow) for form in ("openvino", "torchscript", "pt2")),
        ],
    )
    def test_both_branches_together(self, exported, tiny_free, form, sizes):
        dynamic = ("batch", "size") if len(sizes) > 1 else ("batch",)
        done = exported(tiny_free, form, size=SIZE, nms="peaks", dynamic=dynamic)
        session, truth = open_session(done.path, trust=True), DetectionNetwork(load_detector(tiny_free), "peaks")
        assert done.info.nms == "peaks"
        for count, size in enumerate(sizes, 2):
            images = pictures(count, size)
            found, expected = session(images)[0], truth(images)
            assert found.shape == expected.shape
            assert (expected[..., 4] > 0.3).sum() > 5
            torch.testing.assert_close(found[..., 4], expected[..., 4], rtol=1e-3, atol=1e-5)
            likely = expected[..., 4] > 0.3
            torch.testing.assert_close(found[likely], expected[likely], rtol=1e-4, atol=5e-3)

    def test_untrained_weights_cannot_be_compared(self, tmp_path):
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(description(end2end=True, nc=80)))
        output = tmp_path / "m.torchscript"
        with pytest.raises(ParityError, match=r"cannot be compared: the weights find none.*export raw predictions"):
            export(Request(str(tmp_path / "tiny.yaml"), SIZE, nms="free"), "torchscript", output)
        assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]

    @pytest.mark.slow
    @pytest.mark.parametrize("form", ["onnx", "openvino", "torchscript", "pt2"])
    def test_yolo26(self, tmp_path, form):
        """Ultralytics' own NMS-free network, with scores that reach the threshold."""
        weights = make_detector(tmp_path, "yolo26n.yaml")
        output = tmp_path / f"free{FORMATS[form].suffix}"
        export(Request(str(weights), (96, 160), nms="free"), form, output)
        images = pictures(1, (96, 160))
        found, truth = open_session(output, trust=True)(images)[0], free_by_hand(weights, images)
        torch.testing.assert_close(found[..., 4].double(), truth[..., 4], rtol=1e-4, atol=1e-5)
        # Of scores that are almost equal, the order is anyone's.
        apart = torch.cat((truth[0, :-1, 4] - truth[0, 1:, 4], torch.ones(1))) > 1e-4
        sure = apart & torch.cat((torch.ones(1, dtype=torch.bool), apart[:-1]))
        assert sure.sum() > 3
        torch.testing.assert_close(found[0, sure].double(), truth[0, sure], rtol=1e-4, atol=1e-2)
