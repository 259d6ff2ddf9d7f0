"""A model in two lines of Python: ``visionattn.load`` gives one that takes pictures, returns boxes or probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visionattn.choices import Task
from visionattn.deployment import BGRImage, Detections, Runner, load_runner
from visionattn.errors import ConfigError, DataError, UnsupportedError
from visionattn.packaged import DEFAULT_WEIGHTS
from visionattn.pictures import load_image, pixels_of

Picture = str | Path | Image.Image | NDArray[np.uint8]
"""A file, a picture of PIL, or an array (H, W, 3) of 8 bits."""

Channels = Literal["rgb", "bgr"]
"""The order of an array's colours: ``rgb`` is that of PIL and imageio, ``bgr`` that of OpenCV."""


@dataclass(frozen=True)
class Found(Detections):
    """What a detector found in one picture, best first.

    Attributes:
        names: class name of each box.
    """

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def supervision(self) -> Any:
        """Return the same as ``supervision.Detections``, with class names in ``data["class_name"]``."""
        import supervision

        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.classes,
            data={"class_name": np.array(self.names, dtype=str)},
        )


@dataclass(frozen=True)
class Judged:
    """What a classifier makes of one picture.

    Attributes:
        probabilities: (C,) float32, which sum to 1.
        classes: the C class names.
    """

    probabilities: NDArray[np.float32]
    classes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The most probable class."""
        return self.best(1)[0][0]

    def best(self, count: int = 5) -> list[tuple[str, float]]:
        """Return the most probable classes and their probabilities, the best first."""
        ranked = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.classes[index], float(self.probabilities[index])) for index in ranked]


class Model:
    """A detector or a classifier that is ready to run; :func:`load` makes it.

    Attributes:
        task: ``detect`` or ``classify``.
        names: class index -> class name.
        size: (H, W) of the network's input in pixels.
        device: where it runs.
    """

    def __init__(self, runner: Runner) -> None:
        self.task: Task = runner.task
        self.names, self.size, self.device = runner.names, runner.size, runner.device
        self._runner = runner

    def __call__(self, pictures: Picture | Sequence[Picture], channels: Channels | None = None, batch: int = 16) -> Any:
        """Run on one picture or several, of any sizes.

        Args:
            pictures: a path, a picture of PIL, an array of shape (H, W, 3) and type uint8, or a list of them.
            channels: the order of colours in arrays, ``rgb`` or ``bgr``; it is not guessed. Not needed for the others.
            batch: pictures at a time.

        Returns:
            :class:`Found` of a detector, :class:`Judged` of a classifier: one for one picture, a list for a list.

        Raises:
            ConfigError: an array is given without ``channels``, ``channels`` is unknown, or ``batch`` is below 1.
            DataError: a file cannot be read, or something else than a picture is given.
        """
        if batch < 1:
            raise ConfigError(f"got batch {batch}, expected 1 or more")
        if channels not in (None, "rgb", "bgr"):
            raise ConfigError(f"got channels {channels!r}, expected rgb (PIL, imageio) or bgr (OpenCV)")
        several = isinstance(pictures, list | tuple)
        given: Any = pictures if several else [pictures]
        results: list[Any] = []
        for first in range(0, len(given), batch):
            results += self._runner([_pixels(picture, channels) for picture in given[first : first + batch]])
        named = [self._named(result) for result in results]
        return named if several else named[0]

    def _named(self, result: Any) -> "Found | Judged":
        if isinstance(result, Detections):
            names = tuple(self.names[int(index)] for index in result.classes)
            return Found(result.boxes, result.scores, result.classes, names)
        return Judged(result, tuple(self.names[index] for index in range(len(result))))


def load(
    weights: str | Path = DEFAULT_WEIGHTS,
    device: str = "",
    imgsz: int | tuple[int, int] | None = None,
    *,
    conf: float = 0.25,
    iou: float = 0.7,
    max_det: int = 300,
    trust: bool = False,
    threads: int = 0,
    provider: str = "",
) -> Model:
    """Load weights or an exported file as a model that takes pictures.

    Args:
        weights: a ``.pt`` detector or ``.safetensors`` classifier that training wrote, a name of packaged weights, or
            an exported file (``.onnx``, ``_openvino_model``, ``.engine``, ``.rtx.engine``, ``.torchscript``, ``.pt2``).
        device: ``cpu``, ``0`` or ``cuda:0``, ``mps``; the best there is if empty.
        imgsz: side, or (H, W), of the network's input in pixels; as trained or exported if None.
        conf: boxes of a lower score are left out.
        iou: boxes of a class that overlap a better one by more are left out.
        max_det: most boxes of a picture.
        trust: load a file that may run any code; for files of your own.
        threads: of the CPU; 0 leaves it to the runtime.
        provider: execution provider of ONNX Runtime, or device of OpenVINO; by ``device`` if empty.

    Raises:
        WeightsError: the file is missing, damaged, of another kind, or unsafe to load.
        ConfigError: there is no such device or provider, a number is out of range, or the size is fixed.
        UnsupportedError: the runtime is not installed, or the file is a bare backbone.

    Example:
        >>> model = visionattn.load("yolo-lat-n-aquarium")
        >>> found = model("picture.jpg")
        >>> found.boxes, found.scores, found.names
    """
    runner = load_runner(weights, device, imgsz, conf, iou, max_det, trust, threads=threads, provider=provider)
    if runner.task == "features":
        raise UnsupportedError(
            f"{weights} is a backbone, whose feature maps are no boxes or probabilities; give a detector or "
            "classifier, or use visionattn.deployment.load_runner"
        )
    return Model(runner)


def _pixels(picture: Any, channels: Channels | None) -> BGRImage:
    """Return the pixels of a picture, blue first."""
    if isinstance(picture, str | Path):
        return load_image(Path(picture))
    if isinstance(picture, Image.Image):
        return pixels_of(picture)
    if not isinstance(picture, np.ndarray):
        raise DataError(f"got {type(picture).__name__}, expected a path, a picture of PIL, or an array (H, W, 3)")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise DataError(f"got an array {picture.shape} of {picture.dtype}, expected (H, W, 3) of uint8")
    if channels is None:
        raise ConfigError(
            "an array does not tell the order of its colours; give channels='rgb' (PIL, imageio) or 'bgr' (OpenCV)"
        )
    return picture if channels == "bgr" else np.ascontiguousarray(picture[..., ::-1])
