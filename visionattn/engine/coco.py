"""COCO average precision of boxes."""

import contextlib
import importlib
import io
import math
from collections import Counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from visionattn.errors import DataError, UnsupportedError

Backend = Literal["pycocotools", "faster-coco-eval"]


class DetectionScores(BaseModel):
    """COCO's average precisions in 0..1; nan (null in JSON) where there is nothing to find.

    Attributes:
        ap: mean over the IoU thresholds .50, .55, ... .95 and the classes that have ground truth.
        ap50: at IoU .50.
        ap75: at IoU .75.
        ap_small: of objects below 32 x 32 pixels.
        ap_medium: of objects between.
        ap_large: of objects above 96 x 96 pixels.
        per_class: ``ap`` of each class by name.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    per_class: dict[str, float]


def score(
    ground_truth: dict[str, Any], predictions: list[dict[str, Any]], backend: Backend = "pycocotools"
) -> DetectionScores:
    """Score boxes on all images of ``ground_truth``, those without objects or predictions included.

    Args:
        ground_truth: COCO's form: ``images``, ``annotations``, ``categories``.
        predictions: COCO's result form: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels of the
            image) and ``score``. The 100 best of an image and class count.
        backend: both give the same figures; faster-coco-eval is the faster one.

    Raises:
        DataError: an id that the ground truth does not have, a number that is not finite, or two classes of one name.
        UnsupportedError: faster-coco-eval is not installed.
    """
    _check(ground_truth, predictions)
    coco, evaluator_class = load_backend(backend)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _index(coco, ground_truth, ground_truth["annotations"])
        boxes = [{**p, "area": p["bbox"][2] * p["bbox"][3], "iscrowd": 0} for p in predictions]
        evaluator = evaluator_class(truth, _index(coco, ground_truth, boxes), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # IoU threshold, recall, class
    per_class = {names[id_]: _mean(precision[:, :, k]) for k, id_ in enumerate(evaluator.params.catIds)}
    ap, ap50, ap75, small, medium, large = (math.nan if value < 0 else float(value) for value in evaluator.stats[:6])
    return DetectionScores(
        ap=ap, ap50=ap50, ap75=ap75, ap_small=small, ap_medium=medium, ap_large=large, per_class=per_class
    )


def _check(ground_truth: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
    for key, records in (("image_id", "images"), ("category_id", "categories")):
        known = {record["id"] for record in ground_truth[records]}
        unknown = {p[key] for p in predictions} - known
        if unknown:
            some = ", ".join(str(i) for i in sorted(unknown)[:5])
            raise DataError(
                f"predictions have {len(unknown)} unknown {key} ({some}); "
                f"the ground truth has {len(known)} {records}, ids {min(known)} to {max(known)}"
            )
    if not all(np.isfinite([*p["bbox"], p["score"]]).all() for p in predictions):
        raise DataError("predictions hold a box or a score that is not finite; the model has diverged")
    twice = [name for name, n in Counter(c["name"] for c in ground_truth["categories"]).items() if n > 1]
    if twice:
        raise DataError(f"several classes are called {twice[0]!r}; give each class a name of its own")


def load_backend(backend: Backend) -> tuple[Any, Any]:
    """Return the classes COCO and COCOeval of a backend.

    Raises:
        UnsupportedError: it is not installed.
    """
    if backend == "pycocotools":
        return (
            importlib.import_module("pycocotools.coco").COCO,
            importlib.import_module("pycocotools.cocoeval").COCOeval,
        )
    try:
        module = importlib.import_module("faster_coco_eval")
    except ImportError as error:
        raise UnsupportedError(
            "faster-coco-eval is not installed; pip install 'visionattn[fast-eval]' or use pycocotools"
        ) from error
    return module.COCO, module.COCOeval_faster


def _index(coco: Any, ground_truth: dict[str, Any], annotations: list[dict[str, Any]]) -> Any:
    """Index copies of ``annotations``, numbered from 1: the evaluators write into them and take id 0 for no match."""
    indexed = coco()
    indexed.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)],
    }
    indexed.createIndex()
    return indexed


def _mean(precision: NDArray[np.float64]) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else math.nan
