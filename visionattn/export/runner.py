"""The one abstraction over weights: BGR images in, boxes or probabilities out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform

from visionattn.backbones.classifier import Classifier, load_classifier
from visionattn.detection import YOLOLAT, ExactPredictor, ScoringPredictor, load_detector
from visionattn.errors import ConfigError, WeightsError

BGRImage = NDArray[np.uint8]
"""Array of shape (H, W, 3), blue first, as OpenCV reads it."""


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image, best first.

    Attributes:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the image as it was given.
        scores: (N,) float32 in 0..1.
        classes: (N,) class indices.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]


class Runner(Protocol):
    """A model that is ready to run.

    Attributes:
        names: class index -> class name.
        imgsz: side of the square network input in pixels.
        device: where it runs.
    """

    names: dict[int, str]
    imgsz: int
    device: str

    @property
    def task(self) -> Literal["detect", "classify"]:
        """``detect`` gives :class:`Detections`, ``classify`` probabilities of shape (C,)."""
        ...

    def __call__(self, images: Sequence[BGRImage]) -> list[Any]:
        """Run on images of any sizes as one batch; one result an image, in order."""
        ...


class DetectRunner:
    """A ``.pt`` detector; every image is fitted into the same square, so the others of its batch do not matter."""

    task: Literal["detect"] = "detect"

    def __init__(
        self,
        model: YOLOLAT,
        device: str,
        imgsz: int | None,
        conf: float,
        iou: float,
        max_det: int,
        multi_label: bool,
    ) -> None:
        self.names: dict[int, str] = dict(model.names)
        self.imgsz = _multiple_of(int(model.model.stride.max()), imgsz or int(model.overrides.get("imgsz", 640)))
        self.device = device
        self._model = model
        self._options = {
            "conf": conf,
            "iou": iou,
            "max_det": max_det,
            "predictor": ScoringPredictor if multi_label else ExactPredictor,
            "rect": False,
            "verbose": False,
        }

    def __call__(self, images: Sequence[BGRImage]) -> list[Detections]:
        """Return the boxes of each image."""
        if not images:
            return []
        results = self._model.predict(list(images), imgsz=self.imgsz, device=self.device, **self._options)
        found = (result.boxes.cpu().numpy() for result in results)
        return [Detections(b.xyxy.astype(np.float32), b.conf.astype(np.float32), b.cls.astype(np.int64)) for b in found]


class ClassifyRunner:
    """A ``.safetensors`` classifier."""

    task: Literal["classify"] = "classify"

    def __init__(self, classifier: Classifier, device: str) -> None:
        self.names: dict[int, str] = dict(enumerate(classifier.classes))
        self.imgsz = int(classifier.data_config["input_size"][-1])
        self.device = device
        self._model = classifier.model.eval()
        self._transform: Any = create_transform(**classifier.data_config)

    @torch.inference_mode()
    def __call__(self, images: Sequence[BGRImage]) -> list[NDArray[np.float32]]:
        """Return the probabilities (C,) of each image."""
        if not images:
            return []
        inputs = torch.stack([self._transform(Image.fromarray(image[..., ::-1])) for image in images])
        return list(self._model(inputs.to(self.device)).float().softmax(-1).cpu().numpy())


def load_runner(
    weights: str | Path,
    device: str = "",
    imgsz: int | None = None,
    conf: float = 0.25,
    iou: float = 0.7,
    max_det: int = 300,
    trust: bool = False,
    multi_label: bool = False,
) -> Runner:
    """Load weights by their suffix: ``.pt`` is a detector, ``.safetensors`` a classifier.

    Args:
        weights: file that a training run wrote.
        device: ``cpu``, ``0`` or ``cuda:0``, ``mps``; empty: the best there is.
        imgsz: side of the square network input in pixels, rounded up to the stride; None: as trained. A classifier
            runs at its own size only.
        conf: boxes of a lower score are left out.
        iou: boxes of a class that overlap a better one by more are left out.
        max_det: most boxes of an image.
        trust: load a detector's checkpoint as a plain pickle, which may run any code.
        multi_label: a box may have several classes; for scoring.

    Raises:
        WeightsError: the file is missing, of another kind, damaged, or unsafe to load.
        ConfigError: there is no such device, or a number is out of range.
    """
    weights = Path(weights)
    if not 0 <= conf <= 1 or not 0 <= iou <= 1 or max_det < 1 or (imgsz is not None and imgsz < 1):
        raise ConfigError(
            f"got conf {conf}, iou {iou}, max_det {max_det}, imgsz {imgsz}; expected 0..1, 0..1, 1 or more, 1 or more"
        )
    place = _resolve_device(device)
    if weights.suffix not in (".pt", ".safetensors"):
        raise WeightsError(
            f"{weights}: got suffix {weights.suffix!r}, expected .pt (a detector) or .safetensors (a classifier)"
        )
    if not weights.is_file():
        raise WeightsError(f"weights not found: {weights}; give a file that training wrote, e.g. weights/best.pt")
    if weights.suffix == ".pt":
        return DetectRunner(load_detector(weights, trust), place, imgsz, conf, iou, max_det, multi_label)
    runner = ClassifyRunner(load_classifier(weights, place), place)
    if imgsz not in (None, runner.imgsz):
        raise ConfigError(
            f"{weights}: got imgsz {imgsz}, but this classifier runs at {runner.imgsz} only; leave it out"
        )
    return runner


def _resolve_device(text: str) -> str:
    if not text:
        return "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{text}" if text.isdigit() else text)
    except RuntimeError as error:
        raise ConfigError(f"device {text!r} is unknown; expected cpu, mps, or a GPU's number such as 0") from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 0):
        raise ConfigError(
            f"device {text!r} is not here; this machine has {there['cuda']} CUDA GPUs"
            f"{' and mps' if there['mps'] else ''}; leave it out for the best one, or give cpu"
        )
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type


def _multiple_of(stride: int, side: int) -> int:
    return -(-side // stride) * stride
