import contextlib
import copy
import io
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visionattn.engine.coco import score
from visionattn.errors import DataError

BACKENDS = ["pycocotools", "faster-coco-eval"]


def truth(boxes, images=2, classes=("a", "b")):
    """boxes: (image, category, x, y, w, h)."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 200} for i in range(1, images + 1)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for n, (i, c, *box) in enumerate(boxes, 1)
        ],
        "categories": [{"id": c, "name": name} for c, name in enumerate(classes, 1)],
    }


def guess(image, category, box, value=0.9):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": value}


def exact(ground_truth, seed=0):
    values = np.random.default_rng(seed).uniform(0.1, 1, len(ground_truth["annotations"]))
    return [
        guess(a["image_id"], a["category_id"], a["bbox"], float(v))
        for a, v in zip(ground_truth["annotations"], values, strict=True)
    ]


def independent(ground_truth, predictions):
    """pycocotools as its own demo calls it."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = copy.deepcopy(ground_truth)
        gt.createIndex()
        evaluator = COCOeval(gt, gt.loadRes(copy.deepcopy(predictions)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats[:6]


def six(scores):
    return [scores.ap, scores.ap50, scores.ap75, scores.ap_small, scores.ap_medium, scores.ap_large]


def random_set(seed):
    rng = np.random.default_rng(seed)
    boxes = [
        (int(rng.integers(1, 21)), int(rng.integers(1, 5)), *rng.uniform(0, 90, 2), *rng.choice([12, 50, 110], 2))
        for _ in range(80)
    ]
    ground_truth = truth([(i, c, *map(float, b)) for i, c, *b in boxes], images=25, classes=("a", "b", "c", "d", "e"))
    for annotation in ground_truth["annotations"][::9]:
        annotation["iscrowd"] = 1
    predictions = []
    for annotation in ground_truth["annotations"]:
        for _ in range(int(rng.integers(0, 4))):
            box = np.array(annotation["bbox"]) + rng.normal(0, 4, 4)
            category = annotation["category_id"] if rng.random() < 0.8 else int(rng.integers(1, 6))
            box = [float(v) for v in np.maximum(box, 1)]
            predictions.append(guess(annotation["image_id"], category, box, float(rng.choice([0.2, rng.random()]))))
    return ground_truth, predictions


@pytest.mark.parametrize("backend", BACKENDS)
class TestByHand:
    def test_exact_boxes_score_one_in_every_size(self, backend):
        ground_truth = truth([(1, 1, 0, 0, 20, 20), (1, 2, 50, 50, 50, 50), (2, 1, 10, 10, 120, 120)])
        scores = score(ground_truth, exact(ground_truth), backend)
        assert six(scores) == pytest.approx([1] * 6)
        assert scores.per_class == pytest.approx({"a": 1, "b": 1})

    def test_box_of_iou_0_6_counts_at_three_of_ten_thresholds(self, backend):
        ground_truth = truth([(1, 1, 0, 0, 100, 100)], classes=("a",))
        scores = score(ground_truth, [guess(1, 1, (0, 0, 100, 62))], backend)  # IoU .62: .50, .55, .60
        assert scores.ap == pytest.approx(0.3)
        assert (scores.ap50, scores.ap75) == pytest.approx((1, 0))

    def test_one_of_two_objects_found(self, backend):
        ground_truth = truth([(1, 1, 0, 0, 50, 50), (2, 1, 0, 0, 50, 50)], classes=("a",))
        scores = score(ground_truth, [guess(1, 1, (0, 0, 50, 50))], backend)
        assert scores.ap == pytest.approx(51 / 101)  # precision 1 at the recalls 0, .01, ... .50

    @pytest.mark.parametrize(("false_score", "expected"), [(0.95, 0.5), (0.5, 1.0)])
    def test_false_alarm_on_an_empty_image_costs_by_its_rank(self, backend, false_score, expected):
        ground_truth = truth([(1, 1, 0, 0, 50, 50)], classes=("a",))
        predictions = [guess(1, 1, (0, 0, 50, 50)), guess(2, 1, (0, 0, 50, 50), false_score)]
        assert score(ground_truth, predictions, backend).ap == pytest.approx(expected)

    def test_class_without_ground_truth_is_left_out_of_the_mean(self, backend):
        ground_truth = truth([(1, 1, 0, 0, 50, 50)])
        scores = score(ground_truth, [*exact(ground_truth), guess(1, 2, (0, 0, 9, 9))], backend)
        assert scores.ap == pytest.approx(1)
        assert math.isnan(scores.per_class["b"])
        assert math.isnan(scores.ap_small)
        assert '"ap_small":null' in scores.model_dump_json()

    def test_crowds_neither_count_nor_cost(self, backend):
        ground_truth = truth([(1, 1, 0, 0, 50, 50), (1, 1, 100, 100, 80, 80)], classes=("a",))
        ground_truth["annotations"][1]["iscrowd"] = 1
        predictions = [guess(1, 1, (0, 0, 50, 50), 0.5), guess(1, 1, (110, 110, 30, 30), 0.9)]
        assert score(ground_truth, predictions, backend).ap == pytest.approx(1)

    def test_no_predictions(self, backend):
        scores = score(truth([(1, 1, 0, 0, 50, 50)]), [], backend)
        assert (scores.ap, scores.ap50, scores.ap_medium, scores.per_class["a"]) == (0, 0, 0, 0)

    def test_no_objects_at_all(self, backend):
        scores = score(truth([]), [guess(1, 1, (0, 0, 5, 5))], backend)
        assert all(math.isnan(value) for value in [*six(scores), *scores.per_class.values()])

    def test_category_ids_with_gaps_keep_their_names(self, backend):
        ground_truth = truth([(1, 90, 0, 0, 50, 50), (2, 7, 0, 0, 50, 50)])
        ground_truth["categories"] = [{"id": 90, "name": "late"}, {"id": 7, "name": "early"}]
        scores = score(ground_truth, [guess(1, 90, (0, 0, 50, 50))], backend)
        assert scores.per_class == pytest.approx({"late": 1, "early": 0})

    def test_annotation_id_zero_is_an_object_like_any_other(self, backend):
        ground_truth = truth([(1, 1, 0, 0, 50, 50)], classes=("a",))
        ground_truth["annotations"][0]["id"] = 0
        assert score(ground_truth, exact(ground_truth), backend).ap == pytest.approx(1)

    def test_only_the_100_best_of_an_image_count(self, backend):
        ground_truth = truth([(1, 1, 0, 0, 50, 50)], classes=("a",))
        wrong = [guess(2, 1, (0, 0, 50, 50), 0.1)] + [guess(1, 1, (100, 100, 50, 50), 0.9) for _ in range(100)]
        assert score(ground_truth, [*wrong, guess(1, 1, (0, 0, 50, 50), 0.5)], backend).ap == 0
        assert score(ground_truth, [*wrong[:100], guess(1, 1, (0, 0, 50, 50), 0.5)], backend).ap > 0

    def test_quiet_and_without_side_effects(self, backend, capfd):
        ground_truth, predictions = random_set(0)
        before = copy.deepcopy((ground_truth, predictions))
        score(ground_truth, predictions, backend)
        assert (ground_truth, predictions) == before
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("seed", range(5))
def test_backends_agree_with_each_other_and_with_a_plain_call(seed):
    ground_truth, predictions = random_set(seed)
    reference = independent(ground_truth, predictions)
    assert 0.05 < reference[0] < 0.95
    results = [score(ground_truth, predictions, backend) for backend in BACKENDS]
    for scores in results:
        np.testing.assert_allclose(six(scores), reference, atol=1e-6)
    classes = [list(scores.per_class.values()) for scores in results]
    np.testing.assert_allclose(classes[0], classes[1], atol=1e-6)
    assert np.nanmean(classes[0]) == pytest.approx(reference[0], abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (guess(99, 1, (0, 0, 5, 5)), r"image_id \(99\).*2 images, ids 1 to 2"),
        (guess(1, 0, (0, 0, 5, 5)), r"category_id \(0\).*2 categories, ids 1 to 2"),
        (guess(1, 1, (0, 0, 5, math.nan)), "not finite"),
        (guess(1, 1, (0, 0, 5, 5), math.inf), "not finite"),
    ],
)
def test_wrong_predictions_are_refused(prediction, message):
    with pytest.raises(DataError, match=message):
        score(truth([(1, 1, 0, 0, 50, 50)]), [prediction])


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(DataError, match="several classes are called 'a'"):
        score(truth([], classes=("a", "a")), [])
