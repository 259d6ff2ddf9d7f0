"""Scoring weights on a data set: COCO's average precision for detectors, top-1 and top-5 for classifiers."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from visionattn.atomic import write_text
from visionattn.data import (
    check_data,
    check_images,
    coco_ground_truth,
    load_classification_data,
    load_detection_data,
    load_image,
)
from visionattn.deployment import Detections, Runner, load_runner
from visionattn.deployment.info import ModelInfo
from visionattn.deployment.runner import runner_of
from visionattn.deployment.session import Session
from visionattn.detection import resolve_model
from visionattn.engine.coco import Backend, DetectionScores, load_backend, score
from visionattn.errors import ConfigError, UnsupportedError, WeightsError
from visionattn.record import environment

_log = logging.getLogger("visionattn")


class ClassificationScores(BaseModel):
    """Accuracies in 0..1.

    Attributes:
        top1: share of images whose best class is right.
        top5: share of images whose class is among the five best (or all, if there are fewer).
        per_class: ``top1`` of each class by name.
    """

    model_config = ConfigDict(frozen=True)

    top1: float
    top5: float
    per_class: dict[str, float]


class _Report(BaseModel):
    """What was scored, how, and with what.

    Attributes:
        weights: path of the weights.
        sha256: digest of the weights file.
        data: name of the data set.
        split: its split.
        images: number of images scored.
        skipped: number of broken images left out.
        imgsz: (H, W) of the network input in pixels.
        precision: of its arithmetic.
        batch: images at a time, as the network took them.
        device: where the model ran.
        threads: of the CPU, 0 for as many as the runtime takes.
        seconds: time for reading the images and running the model on all of them.
        environment: date, command, commit, machine, versions.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")

    weights: str
    sha256: str
    data: str
    split: str
    images: int
    skipped: int
    imgsz: tuple[int, int]
    precision: str
    batch: int
    device: str
    threads: int
    seconds: float
    environment: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """The scores alone, fit for JSON: None for nan."""
        scores: dict[str, Any] = json.loads(self.model_dump_json(include={"scores"}))["scores"]
        return scores

    def write(self, path: Path) -> None:
        """Write the report as JSON, whole or not at all; its folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.model_dump_json(indent=2) + "\n")


class DetectionReport(_Report):
    """Scores of a detector, and the settings of its boxes: those of the file where its graph holds them.

    Attributes:
        iou: boxes of a class that overlap a better one by more were left out; None where nothing is suppressed.
    """

    task: Literal["detect"] = "detect"
    nms: str
    conf: float
    iou: float | None
    max_det: int
    backend: Backend
    scores: DetectionScores


class ClassificationReport(_Report):
    """Scores of a classifier."""

    task: Literal["classify"] = "classify"
    scores: ClassificationScores


def evaluate(
    weights: str | Path,
    data: str,
    split: str = "val",
    imgsz: int | tuple[int, int] | None = None,
    batch: int = 16,
    device: str = "",
    trust: bool = False,
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    backend: Backend = "pycocotools",
    skip_broken: bool = False,
    threads: int = 0,
    provider: str = "",
) -> DetectionReport | ClassificationReport:
    """Run weights on every image of a split and score the result against its labels.

    Args:
        weights: a ``.pt`` detector or its name, a ``.safetensors`` classifier, or an exported file of either.
        data: an embedded set; a data.yaml for a detector, a folder of class folders for a classifier.
        split: split to score.
        imgsz: side, or (H, W), of the network input in pixels; None: as trained or exported.
        batch: images at a time.
        device: ``cpu``, ``0``, ...; empty: the best there is.
        trust: load files that may run any code.
        conf: boxes of a lower score are left out.
        iou: boxes of a class that overlap a better one by more are left out.
        max_det: most boxes of an image that are handed to the scorer.
        backend: scorer of boxes; the figures are the same.
        skip_broken: leave out broken images, with a warning for each, instead of raising.
        threads: of the CPU; 0 leaves it to the runtime.
        provider: execution provider of ONNX Runtime, or device of OpenVINO.

    Raises:
        WeightsError: the weights cannot be loaded, have diverged, or have another number of classes than the data.
        DataError: the data set is missing, incomplete or damaged.
        ConfigError: an option is out of range, there is no such device, or a file leaves out boxes that count.
        UnsupportedError: the backend or the runtime is not installed, or the model is a bare backbone.
    """
    if batch < 1:
        raise ConfigError(f"got batch {batch}, expected 1 or more")
    load_backend(backend)
    runner = load_runner(weights, device, imgsz, conf, iou, max_det, trust, True, threads, provider)
    _check_scorable(runner, weights)
    common: dict[str, Any] = {
        "weights": str(weights),
        "sha256": _digest(Path(resolve_model(weights))),
        "split": split,
        "imgsz": runner.size,
        "precision": runner.info.precision,
        "batch": _batch_used(runner.info, batch),
        "device": runner.device,
        "threads": threads,
        "environment": environment(),
    }
    if runner.task == "classify":
        return ClassificationReport(**common, **_classify(runner, data, split, batch, skip_broken))
    settings: dict[str, Any] = {
        "conf": conf,
        **_suppression_used(runner.info, iou, max_det),
        "backend": backend,
        "nms": runner.info.nms,
    }
    return DetectionReport(**common, **settings, **_detect(runner, data, split, batch, skip_broken, backend))


def _batch_used(info: ModelInfo, asked: int) -> int:
    """Return how many images a network takes at once, of which a file may have a number of its own."""
    return min(asked, info.max_batch or asked) if "batch" in info.dynamic else info.batch


def _suppression_used(info: ModelInfo, iou: float, max_det: int) -> dict[str, Any]:
    """Return by what boxes were left out, of which a file may have numbers of its own."""
    if info.nms == "embedded":
        return {"iou": info.iou, "max_det": min(max_det, info.max_det or max_det)}
    return {"iou": iou if info.nms == "none" else None, "max_det": max_det}


def score_session(session: Session, data: str, split: str) -> DetectionScores | ClassificationScores:
    """Score a network that is loaded, at its own size; arguments and errors as :func:`evaluate`."""
    runner = runner_of(session, session.info.size, conf=0.001, multi_label=True)
    _check_scorable(runner, session.info.model)
    found = (
        _classify(runner, data, split, 16, False)
        if runner.task == "classify"
        else _detect(runner, data, split, 16, False, "pycocotools")
    )
    scores: DetectionScores | ClassificationScores = found["scores"]
    return scores


def _check_scorable(runner: Runner, weights: str | Path) -> None:
    if runner.task == "features":
        raise UnsupportedError(
            f"{weights} is a backbone, whose feature maps have no score; give a detector or classifier"
        )


def _digest(weights: Path) -> str:
    """Return the SHA-256 of a file, or of the files of a folder one after the other."""
    digest = hashlib.sha256()
    weights = weights.parent if weights.suffix == ".xml" else weights  # its numbers lie beside it
    for file in [weights] if weights.is_file() else sorted(file for file in weights.iterdir() if file.is_file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _detect(runner: Runner, source: str, split: str, batch: int, skip_broken: bool, backend: Backend) -> dict[str, Any]:
    whole = load_detection_data(source, (split,))
    _check_classes(runner, list(whole.names.values()), whole.name)
    data = check_data(whole, (split,), skip_broken)
    ground_truth = coco_ground_truth(data, split)
    outputs, seconds = _run(runner, data.images[split], batch)
    predictions = [
        prediction
        for image, found in zip(ground_truth["images"], outputs, strict=True)
        for prediction in _coco_predictions(image["id"], found)
    ]
    return {
        "data": data.name,
        "images": len(outputs),
        "skipped": len(whole.images[split]) - len(outputs),
        "seconds": seconds,
        "scores": score(ground_truth, predictions, backend),
    }


def _classify(runner: Runner, source: str, split: str, batch: int, skip_broken: bool) -> dict[str, Any]:
    data = load_classification_data(source, (split,))
    _check_classes(runner, data.names, data.name)
    broken = set(check_images(data, (split,), skip_broken))
    samples = [(path, label) for path, label in data.samples(split) if path not in broken]
    outputs, seconds = _run(runner, [path for path, _ in samples], batch)
    return {
        "data": data.name,
        "images": len(samples),
        "skipped": len(broken),
        "seconds": seconds,
        "scores": _accuracy(np.stack(outputs), np.array([label for _, label in samples]), data.names),
    }


def _run(runner: Runner, paths: Sequence[Path], batch: int) -> tuple[list[Any], float]:
    """Run on all images in order; return one output an image, and the seconds it took."""
    start = time.perf_counter()
    outputs: list[Any] = []
    with tqdm(total=len(paths), desc="evaluating", unit="image", leave=False, disable=None) as bar:
        for first in range(0, len(paths), batch):
            images = [load_image(path) for path in paths[first : first + batch]]
            outputs += runner(images)
            bar.update(len(images))
    return outputs, time.perf_counter() - start


def _coco_predictions(image_id: int, found: Detections) -> Iterator[dict[str, Any]]:
    """Yield boxes in COCO's form; the category id of our ground truth is the class index + 1."""
    columns = (found.boxes.tolist(), found.scores.tolist(), found.classes.tolist())
    for (x1, y1, x2, y2), value, index in zip(*columns, strict=True):
        yield {"image_id": image_id, "category_id": index + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": value}


def _accuracy(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], names: Sequence[str]
) -> ClassificationScores:
    """Score probabilities (N, C) against class indices (N,)."""
    if not np.isfinite(probabilities).all():
        raise WeightsError("the model gives probabilities that are not finite: its weights have diverged")
    ranked = np.argsort(-probabilities, axis=1, kind="stable")
    hits = ranked[:, :5] == labels[:, None]
    return ClassificationScores(
        top1=float(hits[:, 0].mean()),
        top5=float(hits.any(axis=1).mean()),
        per_class={name: float(hits[labels == index, 0].mean()) for index, name in enumerate(names)},
    )


def _check_classes(runner: Runner, names: list[str], data: str) -> None:
    trained = [runner.names[index] for index in sorted(runner.names)]
    if len(trained) != len(names):
        raise WeightsError(
            f"the weights know {len(trained)} classes ({_few(trained)}), the data set {data} has {len(names)} "
            f"({_few(names)}); give the data set the weights were trained for, or weights trained for it"
        )
    if trained != names:
        _log.warning(
            "the class names of the weights (%s) and of %s (%s) differ; they are matched by index",
            _few(trained),
            data,
            _few(names),
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
