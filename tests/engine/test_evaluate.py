import contextlib
import hashlib
import io
import json
import logging
import math
import sys

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visionattn.deployment import Detections
from visionattn.deployment.info import ModelInfo
from visionattn.engine import evaluate as module
from visionattn.engine.evaluate import evaluate
from visionattn.errors import ConfigError, DataError, UnsupportedError, WeightsError

NAMES = ["ant", "bee", "cat"]
# image -> (width, height), objects as (class index, x1, y1, x2, y2) in pixels
SCENES = {
    0: ((200, 100), [(0, 10, 10, 60, 50), (1, 100, 20, 190, 90)]),
    1: ((80, 160), [(1, 0, 0, 20, 25), (1, 40, 60, 79, 150)]),
    2: ((64, 64), []),
    3: ((120, 120), [(0, 5, 5, 115, 110), (0, 50, 50, 64, 63)]),
    4: ((150, 70), []),
    5: ((90, 90), [(1, 30, 30, 77, 81)]),
    6: ((201, 133), [(0, 1, 2, 51, 99), (1, 60, 3, 90, 44), (0, 100, 60, 200, 130)]),
}


@pytest.fixture
def data(tmp_path):
    """A detection set in YOLO form; every image is of one grey, ten times its number, by which FakeRunner knows it."""
    for folder in ("images/val", "labels/val"):
        (tmp_path / folder).mkdir(parents=True)
    for number, ((width, height), objects) in SCENES.items():
        cv2.imwrite(str(tmp_path / f"images/val/{number}.png"), np.full((height, width, 3), 10 * number, np.uint8))
        lines = [
            f"{index} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} {(x2 - x1) / width} {(y2 - y1) / height}"
            for index, x1, y1, x2, y2 in objects
        ]
        if objects:
            (tmp_path / f"labels/val/{number}.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"val": "images/val", "names": NAMES}))
    return tmp_path / "data.yaml"


class FakeRunner:
    """Finds what ``found`` says: image number -> rows of class, x1, y1, x2, y2, score."""

    task = "detect"
    size = (320, 320)
    info = ModelInfo(task="detect", names={}, size=size, stride=32)
    device = "cpu"

    def __init__(self, found, names=NAMES):
        self.found, self.names, self.batches = found, dict(enumerate(names)), []

    def __call__(self, images):
        self.batches.append(len(images))
        numbers = [round(image.mean() / 10) for image in images]
        for number, image in zip(numbers, images, strict=True):
            assert image.shape[:2] == SCENES[number][0][::-1]
        rows = [np.array(self.found.get(number, []), np.float32).reshape(-1, 6) for number in numbers]
        return [Detections(r[:, 1:5], r[:, 5], r[:, 0].astype(np.int64)) for r in rows]


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Let evaluate() load a given runner; returns the path of its weights."""
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"weights")

    def put(runner):
        monkeypatch.setattr(module, "load_runner", lambda *_, **__: runner)
        return weights

    return put


def exact(score=0.9):
    return {number: [(*box, score) for box in objects] for number, (_, objects) in SCENES.items()}


def random_guess(seed):
    """Some objects are missed, some found twice or as another class, all are shifted, and there are false alarms."""
    rng = np.random.default_rng(seed)
    found = {}
    for number, ((width, height), objects) in SCENES.items():
        rows = []
        for index, *box in objects:
            for _ in range(rng.integers(0, 3)):
                corners = np.array(box) + rng.normal(0, 3, 4)
                rows.append((index if rng.random() < 0.8 else rng.integers(0, 3), *corners, rng.random()))
        for _ in range(rng.integers(0, 3)):
            x, y = rng.random(2) * (width - 20, height - 20)
            rows.append((rng.integers(0, 3), x, y, x + 20, y + 20, rng.random()))
        found[number] = rows
    return found


def independent(found):
    """Score by pycocotools from SCENES itself, without our readers and converters; category ids start at 70."""
    images = [{"id": n, "width": size[0], "height": size[1]} for n, (size, _) in SCENES.items()]
    objects = [(n, box) for n, (_, boxes) in SCENES.items() for box in boxes]
    ground_truth = {
        "images": images,
        "categories": [{"id": 70 + index, "name": name} for index, name in enumerate(NAMES)],
        "annotations": [
            {
                "id": i,
                "image_id": n,
                "category_id": 70 + index,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            for i, (n, (index, x1, y1, x2, y2)) in enumerate(objects, 1)
        ],
    }
    results = [
        {"image_id": n, "category_id": 70 + int(c), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(np.float32(s))}
        for n, rows in found.items()
        for c, x1, y1, x2, y2, s in rows
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = ground_truth
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats[:6]


def six(report):
    return [report.metrics[key] for key in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")]


class TestDetection:
    def test_the_ground_truth_itself_scores_one(self, data, use):
        runner = FakeRunner(exact())
        weights = use(runner)
        report = evaluate(weights, str(data), batch=3)
        assert six(report) == pytest.approx([1] * 6)
        assert report.metrics["per_class"] == {"ant": pytest.approx(1), "bee": pytest.approx(1), "cat": None}
        assert runner.batches == [3, 3, 1]
        assert (report.images, report.skipped, report.split, report.imgsz) == (7, 0, "val", (320, 320))
        assert report.sha256 == hashlib.sha256(b"weights").hexdigest()
        assert report.environment["versions"]["torch"]

    @pytest.mark.parametrize("backend", ["pycocotools", "faster-coco-eval"])
    @pytest.mark.parametrize("seed", range(4))
    def test_random_guesses_score_as_an_independent_call_says(self, data, use, seed, backend):
        found = random_guess(seed)
        expected = independent(found)
        assert 0 < expected[0] < 1
        report = evaluate(use(FakeRunner(found)), str(data), batch=2, backend=backend)
        np.testing.assert_allclose(six(report), expected, atol=1e-6)

    @pytest.mark.parametrize("shift", [2, 8, 1000])
    def test_shifted_boxes(self, data, use, shift):
        found = {n: [(c, x1 + shift, y1, x2 + shift, y2, s) for c, x1, y1, x2, y2, s in r] for n, r in exact().items()}
        report = evaluate(use(FakeRunner(found)), str(data))
        np.testing.assert_allclose(six(report), independent(found), atol=1e-6)
        assert (report.metrics["ap"] == 0) == (shift == 1000)

    def test_swapped_classes_score_nothing(self, data, use):
        found = {n: [(1 - c, *rest) for c, *rest in rows] for n, rows in exact().items()}
        assert evaluate(use(FakeRunner(found)), str(data)).metrics["ap"] == 0

    def test_false_alarms_on_empty_images_cost(self, data, use):
        found = exact(0.5) | {2: [(0, 1, 1, 40, 40, 0.9)], 4: [(1, 1, 1, 40, 40, 0.9)]}
        report = evaluate(use(FakeRunner(found)), str(data))
        assert report.metrics["ap"] == pytest.approx(independent(found)[0], abs=1e-6)
        assert report.metrics["ap"] < 0.9

    def test_nothing_found(self, data, use):
        assert evaluate(use(FakeRunner({})), str(data)).metrics["ap"] == 0

    def test_upright_coordinates_of_a_photo_stored_sideways(self, data, use):
        file = data.parent / "images/val/0.png"
        file.unlink()
        stored = Image.fromarray(np.zeros((200, 100, 3), np.uint8))
        exif = stored.getexif()
        exif[0x0112] = 6  # to be turned by 90 degrees: upright it is 200 wide
        stored.save(file.with_suffix(".jpg"), exif=exif)
        assert evaluate(use(FakeRunner(exact())), str(data)).metrics["ap"] == pytest.approx(1)

    def test_report_is_json_without_nan(self, data, use, tmp_path):
        report = evaluate(use(FakeRunner(exact())), str(data))
        report.write(tmp_path / "new" / "report.json")
        written = json.loads((tmp_path / "new" / "report.json").read_text(), parse_constant=pytest.fail)
        assert written["scores"] == report.metrics
        assert written["scores"]["per_class"]["cat"] is None
        assert math.isnan(report.scores.per_class["cat"])
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.json"]

    def test_other_number_of_classes(self, data, use):
        with pytest.raises(WeightsError, match=r"know 2 classes \(ant, bee\).* has 3 \(ant, bee, cat\)"):
            evaluate(use(FakeRunner(exact(), NAMES[:2])), str(data))

    def test_weights_by_name(self, data):
        with pytest.raises(WeightsError, match=r"know 7 classes \(fish, .* has 3 \(ant, bee, cat\)"):
            evaluate("yolo-lat-n-aquarium", str(data))

    def test_other_names_are_warned_of(self, data, use, caplog):
        with caplog.at_level(logging.WARNING, "visionattn"):
            evaluate(use(FakeRunner(exact(), ["bee", "ant", "cat"])), str(data))
        assert "differ; they are matched by index" in caplog.text

    def test_broken_image(self, data, use):
        (data.parent / "images/val/3.png").write_bytes(b"no picture")
        weights = use(FakeRunner(exact()))
        with pytest.raises(DataError, match=r"3\.png"):
            evaluate(weights, str(data))
        report = evaluate(weights, str(data), skip_broken=True)
        assert (report.images, report.skipped) == (6, 1)
        assert report.metrics["ap"] == pytest.approx(1)

    def test_refusals_before_anything_is_run(self, data, use, monkeypatch):
        runner = FakeRunner(exact())
        weights = use(runner)
        with pytest.raises(ConfigError, match="got batch 0"):
            evaluate(weights, str(data), batch=0)
        with pytest.raises(DataError, match="test"):
            evaluate(weights, str(data), split="test")
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
        with pytest.raises(UnsupportedError, match="faster-coco-eval is not installed"):
            evaluate(weights, str(data), backend="faster-coco-eval")
        assert runner.batches == []


class TestClassification:
    CLASSES = "abcdefg"

    @pytest.fixture
    def folders(self, tmp_path):
        """Two images a class; image j of class i is of the grey 30 * i + 10 * j."""
        for index, name in enumerate(self.CLASSES):
            folder = tmp_path / "set" / "val" / name
            folder.mkdir(parents=True)
            for j in range(2):
                cv2.imwrite(str(folder / f"{j}.png"), np.full((20, 20, 3), 30 * index + 10 * j, np.uint8))
        return tmp_path / "set"

    def runner(self, rank):
        """Gives the right class the place ``rank(class index, image)`` among the seven."""

        class Fake(FakeRunner):
            task = "classify"

            def __call__(self, images):
                return [self.one(int(image[0, 0, 0])) for image in images]

            def one(self, grey):
                index, image = grey // 30, grey % 30 // 10
                others = [c for c in range(7) if c != index]
                others.insert(rank(index, image), index)
                probabilities = np.empty(7, np.float32)
                probabilities[others] = np.linspace(0.25, 0.05, 7)
                return probabilities

        return Fake({}, list(self.CLASSES))

    @pytest.mark.parametrize(
        ("rank", "top1", "top5"),
        [
            (lambda index, image: 0, 1, 1),
            (lambda index, image: 4, 0, 1),
            (lambda index, image: 5, 0, 0),
            (lambda index, image: 0 if index == 2 else 6 * image, 8 / 14, 8 / 14),
            (lambda index, image: index, 2 / 14, 10 / 14),
        ],
    )
    def test_accuracies_by_hand(self, folders, use, rank, top1, top5):
        report = evaluate(use(self.runner(rank)), str(folders), batch=4)
        assert (report.metrics["top1"], report.metrics["top5"]) == pytest.approx((top1, top5))
        assert (report.task, report.images) == ("classify", 14)

    def test_by_class(self, folders, use):
        report = evaluate(use(self.runner(lambda index, image: image if index == 3 else 0)), str(folders))
        assert report.metrics["per_class"] == {name: 0.5 if name == "d" else 1.0 for name in self.CLASSES}

    def test_ties_are_no_hits(self, folders, use):
        runner = self.runner(None)
        runner.one = lambda grey: np.full(7, 1 / 7, np.float32)
        assert evaluate(use(runner), str(folders)).metrics["top1"] == pytest.approx(1 / 7)

    def test_diverged_weights(self, folders, use):
        runner = self.runner(None)
        runner.one = lambda grey: np.full(7, np.nan, np.float32)
        with pytest.raises(WeightsError, match="diverged"):
            evaluate(use(runner), str(folders))

    def test_other_number_of_classes(self, folders, use):
        runner = self.runner(None)
        del runner.names[6]
        with pytest.raises(WeightsError, match="know 6 classes"):
            evaluate(use(runner), str(folders))

    def test_broken_image(self, folders, use):
        (folders / "val" / "a" / "0.png").write_bytes(b"no picture")
        weights = use(self.runner(lambda index, image: 0))
        with pytest.raises(DataError, match=r"0\.png"):
            evaluate(weights, str(folders))
        report = evaluate(weights, str(folders), skip_broken=True)
        assert (report.images, report.skipped, report.metrics["top1"]) == (13, 1, 1)


def test_a_report_says_what_a_file_used():
    common = {"task": "detect", "names": {}, "size": (64, 64), "stride": 32}
    file = ModelInfo(**common, nms="embedded", conf=0.001, iou=0.5, max_det=100, batch=2)
    engine = ModelInfo(**common, dynamic=("batch",), max_batch=8, nms="peaks")
    weights = ModelInfo(**common, dynamic=("batch",))
    assert [module._batch_used(info, 16) for info in (file, engine, weights)] == [2, 8, 16]
    assert module._suppression_used(file, 0.7, 300) == {"iou": 0.5, "max_det": 100}
    assert module._suppression_used(engine, 0.7, 300) == {"iou": None, "max_det": 300}
    assert module._suppression_used(weights, 0.7, 300) == {"iou": 0.7, "max_det": 300}


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_the_size_of_a_batch_changes_no_score(use, data, batch):
    found = {number: [(index, *box, 0.9) for index, *box in objects] for number, (_, objects) in SCENES.items()}
    assert evaluate(use(FakeRunner(found)), data, batch=batch).scores.ap == pytest.approx(1)
