import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from visionattn.backbones.classifier import build_classifier, save_classifier
from visionattn.deployment import load_runner
from visionattn.detection import build_detector, load_detector
from visionattn.errors import ConfigError, WeightsError

SIDE = 64


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """An untrained detector with normalised activations, so that its scores and boxes vary, and its file."""
    torch.manual_seed(0)
    model = build_detector("yolo-lat-n")
    network, head = model.model, model.model.model[-1]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1
    with torch.no_grad():
        for boxes, classes in zip(head.cv2, head.cv3, strict=True):
            boxes[-1].weight.normal_(std=0.3)
            classes[-1].weight.normal_(std=0.3)
            classes[-1].bias.fill_(-3)
        network.train()(torch.rand(16, 3, SIDE, SIDE))
    path = tmp_path_factory.mktemp("detector") / "random.pt"
    model.save(path)
    return load_detector(path), path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An untrained classifier and its file."""
    torch.manual_seed(0)
    built = build_classifier("test_vit", ["a", "b", "c"], 32, {})
    path = tmp_path_factory.mktemp("classifier") / "random.safetensors"
    parts = {"name": built.name, "kwargs": built.kwargs, "classes": built.classes, "data_config": built.data_config}
    save_classifier(built.model, path, **parts)
    return built, path


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_hand(model, image, conf, iou):
    """Letterbox to the middle of a grey square, forward, class-wise NMS, back to pixels of the image."""
    height, width = image.shape[:2]
    ratio = SIDE / max(height, width)
    new = (round(width * ratio), round(height * ratio))
    left, top = (SIDE - new[0]) // 2, (SIDE - new[1]) // 2
    canvas = np.full((SIDE, SIDE, 3), 114, np.uint8)
    canvas[top : top + new[1], left : left + new[0]] = cv2.resize(image, new) if new != (width, height) else image
    inputs = torch.from_numpy(canvas[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        output = model.model.eval()(inputs)[0][0].T
    (x, y, w, h), (scores, classes) = output[:, :4].T, output[:, 4:].max(1)
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
    likely = scores > conf
    boxes, scores, classes = boxes[likely], scores[likely], classes[likely]
    keep = batched_nms(boxes, scores, classes, iou)
    across, down = new[0] / width, new[1] / height
    boxes = (boxes[keep] - torch.tensor([left, top, left, top])) / torch.tensor([across, down, across, down])
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height])).numpy(), scores[keep], classes[keep]


class TestDetect:
    @pytest.mark.parametrize("size", [(64, 64), (48, 64), (128, 96), (60, 20)])
    def test_boxes_are_those_of_the_bare_model_in_pixels_of_the_image(self, detector, size):
        model, path = detector
        image = picture(*size)
        found = load_runner(path, "cpu", SIDE, conf=0.2, iou=0.5)([image])[0]
        boxes, scores, classes = by_hand(model, image, 0.2, 0.5)
        assert len(boxes) > 3
        np.testing.assert_allclose(found.boxes, boxes, atol=1e-2)
        np.testing.assert_allclose(found.scores, scores, atol=1e-4)
        np.testing.assert_array_equal(found.classes, classes)
        assert (found.boxes.dtype, found.scores.dtype, found.classes.dtype) == (np.float32, np.float32, np.int64)

    def test_an_image_does_not_depend_on_the_others_of_its_batch(self, detector):
        images = [picture(40, 64, 1), picture(64, 30, 2), picture(40, 64, 3)]
        runner = load_runner(detector[1], "cpu", SIDE, conf=0.2)
        for together, image in zip(runner(images), images, strict=True):
            alone = runner([image])[0]
            assert len(alone.boxes) > 3
            np.testing.assert_allclose(together.boxes, alone.boxes, atol=1e-2)
            np.testing.assert_array_equal(together.classes, alone.classes)

    def test_threshold_and_most_boxes(self, detector):
        image = picture(64, 64)
        assert len(load_runner(detector[1], "cpu", SIDE, conf=0.0, max_det=5)([image])[0].scores) == 5
        scores, likely = (load_runner(detector[1], "cpu", SIDE, conf=c)([image])[0].scores for c in (0.1, 0.3))
        assert 0 < len(likely) < len(scores)
        assert (likely > 0.3).all()
        nothing = load_runner(detector[1], "cpu", SIDE, conf=1.0)([image])[0]
        assert (nothing.boxes.shape, nothing.scores.shape, nothing.classes.shape) == ((0, 4), (0,), (0,))

    def test_what_it_tells_of_itself(self, detector):
        runner = load_runner(str(detector[1]), "cpu", imgsz=70)
        assert (runner.task, runner.size, runner.device) == ("detect", (96, 96), "cpu")
        assert runner.names == detector[0].names
        assert runner([]) == []

    def test_nothing_is_written(self, detector, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        load_runner(detector[1], "cpu", SIDE)([picture(64, 64)])
        assert not list(tmp_path.iterdir())


class TestClassify:
    def test_probabilities_are_those_of_the_bare_model(self, weights):
        built, path = weights
        images = [picture(32, 32, 1), picture(32, 32, 2)]
        got = load_runner(path, "cpu")(images)
        rgb = torch.from_numpy(np.stack(images)[..., ::-1].copy()).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(built.data_config[key]).view(3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            expected = built.model.eval()((rgb - mean) / std).softmax(-1).numpy()
        np.testing.assert_allclose(np.stack(got), expected, atol=1e-5)
        assert np.abs(expected[0] - expected[1]).max() > 1e-3

    def test_images_of_any_size(self, weights):
        got = load_runner(weights[1], "cpu")([picture(20, 50), picture(100, 33)])
        assert [p.shape for p in got] == [(3,), (3,)]
        np.testing.assert_allclose([p.sum() for p in got], 1, atol=1e-5)

    def test_what_it_tells_of_itself(self, weights):
        runner = load_runner(weights[1], "cpu", imgsz=32)
        assert (runner.task, runner.size, runner.names) == ("classify", (32, 32), {0: "a", 1: "b", 2: "c"})
        assert runner([]) == []

    def test_another_size_is_refused(self, weights):
        with pytest.raises(ConfigError, match=r"got imgsz 64.*at 32 only"):
            load_runner(weights[1], "cpu", imgsz=64)


class TestRefusals:
    @pytest.mark.parametrize("name", ["model.tflite", "model", "model.pth"])
    def test_unknown_suffix(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(WeightsError, match=r"expected \.pt .* or \.safetensors"):
            load_runner(tmp_path / name)

    @pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors"])
    def test_missing_file(self, tmp_path, name):
        with pytest.raises(WeightsError, match="weights not found"):
            load_runner(tmp_path / name)

    @pytest.mark.parametrize("name", ["bad.pt", "bad.safetensors"])
    def test_damaged_file(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(WeightsError, match="damaged"):
            load_runner(tmp_path / name)

    @pytest.mark.parametrize("device", ["99", "cuda:99", "gpu", "0,1", "meta"])
    def test_device_that_is_not_here(self, device):
        with pytest.raises(ConfigError, match=f"device '{device}'"):
            load_runner(Path("any.pt"), device)

    @pytest.mark.parametrize("options", [{"conf": 1.5}, {"iou": -0.1}, {"max_det": 0}, {"imgsz": 0}])
    def test_numbers_out_of_range(self, options):
        with pytest.raises(ConfigError, match=r"expected 0\.\.1"):
            load_runner("any.pt", **options)


def test_boxes_do_not_depend_on_the_clock(detector, monkeypatch):
    """The stock suppression gives up after a time limit and leaves the rest of the batch without boxes."""
    images = [picture(64, 64), picture(64, 64)]
    before = load_runner(detector[1], "cpu", SIDE, conf=0.0)(images)
    clock = itertools.count(0, 1000)
    monkeypatch.setattr("ultralytics.utils.nms.time.time", lambda: next(clock))
    after = load_runner(detector[1], "cpu", SIDE, conf=0.0)(images)
    assert all(len(found.scores) for found in before)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)


def test_scoring_gives_a_box_all_its_classes(detector):
    image = picture(64, 64)
    best = load_runner(detector[1], "cpu", SIDE, conf=0.0, iou=1.0, max_det=30000)([image])[0]
    every = load_runner(detector[1], "cpu", SIDE, conf=0.0, iou=1.0, max_det=30000, multi_label=True)([image])[0]
    classes = len(load_runner(detector[1], "cpu", SIDE).names)
    assert classes > 1
    assert len(every.scores) == classes * len(best.scores)
