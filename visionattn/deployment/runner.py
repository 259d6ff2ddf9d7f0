"""The one abstraction over weights and exported files: BGR images in, boxes, probabilities or feature maps out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visionattn.choices import Task
from visionattn.deployment.formats import format_of
from visionattn.deployment.info import ModelInfo, size_text
from visionattn.deployment.inputs import BGRImage, prepare
from visionattn.deployment.network import Request, load_network
from visionattn.deployment.session import Place, Session, TorchSession, torch_device
from visionattn.detection import WEIGHTS, check_form, in_image, resolve_model, suppress
from visionattn.errors import ConfigError, WeightsError

SUFFIXES = (".pt", ".safetensors")


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
        info: what the model is.
        names: class index -> class name.
        size: (H, W) of the network input in pixels.
        device: where it runs.
    """

    info: ModelInfo
    names: dict[int, str]
    size: tuple[int, int]
    device: str

    @property
    def task(self) -> Task:
        """``detect`` gives :class:`Detections`, ``classify`` probabilities (C,), ``features`` maps (C, H, W)."""
        ...

    def __call__(self, images: Sequence[BGRImage]) -> list[Any]:
        """Run on images of any sizes; one result an image, in order."""
        ...


class _Runner:
    def __init__(self, session: Session, size: tuple[int, int]) -> None:
        self.session, self.size = session, size
        self.info, self.names, self.device = session.info, session.info.names, session.device

    @property
    def task(self) -> Task:
        """What the network is for."""
        return self.info.task

    def prepare(self, images: Sequence[BGRImage]) -> Tensor:
        """Return the network's input for images, (B, 3, H, W)."""
        return prepare(images, self.info, self.size, self.session.place)


class DetectRunner(_Runner):
    """A detector; every image is fitted into the same rectangle, so the others of its batch do not matter."""

    def __init__(
        self, session: Session, size: tuple[int, int], conf: float, iou: float, max_det: int, multi_label: bool
    ) -> None:
        super().__init__(session, size)
        self._options: dict[str, Any] = {"conf": conf, "iou": iou, "max_det": max_det, "multi_label": multi_label}
        self._options["finished"] = session.info.nms != "none"

    def __call__(self, images: Sequence[BGRImage]) -> list[Detections]:
        """Return the boxes of each image."""
        if not images:
            return []
        raw = self.session(self.prepare(images))[0]
        check_form(raw, self._options["finished"], len(self.names))
        return [
            self._detections(found, image) for found, image in zip(suppress(raw, **self._options), images, strict=True)
        ]

    def _detections(self, found: Tensor, image: BGRImage) -> Detections:
        boxes = in_image(found[:, :4], self.size, image.shape)
        return Detections(
            boxes.cpu().numpy().astype(np.float32),
            found[:, 4].cpu().numpy().astype(np.float32),
            found[:, 5].cpu().numpy().astype(np.int64),
        )


class ClassifyRunner(_Runner):
    """A classifier."""

    def __call__(self, images: Sequence[BGRImage]) -> list[NDArray[np.float32]]:
        """Return the probabilities (C,) of each image."""
        return list(self.session(self.prepare(images))[0].softmax(-1).cpu().numpy()) if images else []


class FeaturesRunner(_Runner):
    """A backbone."""

    def __call__(self, images: Sequence[BGRImage]) -> list[list[NDArray[np.float32]]]:
        """Return the feature maps of each image, each (C, H, W)."""
        if not images:
            return []
        maps = [level.cpu().numpy() for level in self.session(self.prepare(images))]
        return [[level[index] for level in maps] for index in range(len(images))]


def load_runner(
    weights: str | Path,
    device: str = "",
    imgsz: int | tuple[int, int] | None = None,
    conf: float = 0.25,
    iou: float = 0.7,
    max_det: int = 300,
    trust: bool = False,
    multi_label: bool = False,
    threads: int = 0,
    provider: str = "",
) -> Runner:
    """Load weights or an exported file by its suffix.

    Args:
        weights: a ``.pt`` detector or ``.safetensors`` classifier that training wrote, a name in
            :data:`visionattn.detection.WEIGHTS`, or a file of ``tools/export.py``: ``.onnx``, ``_openvino_model``,
            ``.engine``, ``.rtx.engine``, ``.torchscript``, ``.pt2``.
        device: ``cpu``, ``0`` or ``cuda:0``, ``mps``; empty: the best there is.
        imgsz: side, or (H, W), of the network input in pixels, rounded up to the stride; None: as trained or exported.
            A classifier's weights and files of a fixed size run at their own size only.
        conf: boxes of a lower score are left out.
        iou: boxes of a class that overlap a better one by more are left out.
        max_det: most boxes of an image.
        trust: load files that may run any code: a detector's checkpoint with foreign classes, a ``.pt2``.
        multi_label: a box may have several classes; for scoring.
        threads: of the CPU; 0 leaves it to the runtime.
        provider: execution provider of ONNX Runtime, or device of OpenVINO; empty: by ``device``.

    Raises:
        WeightsError: the file is missing, of another kind, damaged, or unsafe to load.
        ConfigError: there is no such device or provider, a number is out of range, or the size is fixed.
        UnsupportedError: the runtime is not installed, or lacks the hardware that the file needs.
    """
    weights = Path(weights)
    sides = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    if not 0 <= conf <= 1 or not 0 <= iou <= 1 or max_det < 1 or threads < 0 or (sides and min(sides) < 1):
        raise ConfigError(
            f"got conf {conf}, iou {iou}, max_det {max_det}, imgsz {imgsz}, threads {threads}; "
            "expected 0..1, 0..1, 1 or more, 1 or more, 0 or more"
        )
    session = open_session(weights, Place(device, threads, provider), trust)
    return runner_of(session, _size(session.info, sides, weights), conf, iou, max_det, multi_label)


def runner_of(
    session: Session,
    size: tuple[int, int],
    conf: float = 0.25,
    iou: float = 0.7,
    max_det: int = 300,
    multi_label: bool = False,
) -> Runner:
    """Return a runner of a network that is loaded; arguments as for :func:`load_runner`."""
    if session.info.nms == "embedded" and (session.info.conf or 0) > conf:
        raise ConfigError(
            f"{session.info.model}: boxes of a score up to {session.info.conf} are cut out of this file; give a "
            "conf as high, or export it with a lower one or with nms=none"
        )
    if session.info.task == "detect":
        return DetectRunner(session, size, conf, iou, max_det, multi_label)
    return ClassifyRunner(session, size) if session.info.task == "classify" else FeaturesRunner(session, size)


def open_session(path: Path, place: Place | None = None, trust: bool = False) -> Session:
    """Load weights or an exported file as a bare network; arguments and errors as :func:`load_runner`."""
    path, place = Path(resolve_model(path)), place or Place()
    if path.suffix in (".yaml", ".yml"):
        named = f", or one of {', '.join(WEIGHTS)}" if WEIGHTS else ""
        raise WeightsError(f"{path.name}: a yaml holds no weights; give a file that training wrote{named}")
    found = None if path.suffix in SUFFIXES else format_of(path)
    if found is None:
        torch_device(place.device)
    if not path.exists():
        raise WeightsError(f"weights not found: {path}; give a file that training wrote, or one of tools/export.py")
    if found is None:
        dynamic: Any = ("batch", "size") if path.suffix == ".pt" else ("batch",)
        network = load_network(Request(str(path), dynamic=dynamic, trust=trust))
        return TorchSession(network.module, network.info, place)
    if found.runs_code and not trust:
        raise WeightsError(f"{path}: loading such a file may run any code; if it is your own, pass --trust-weights")
    return found.open_session(path, place)


def _size(info: ModelInfo, asked: tuple[int, int] | None, weights: Path) -> tuple[int, int]:
    if asked is None:
        return info.size
    size = (_multiple_of(info.stride, asked[0]), _multiple_of(info.stride, asked[1]))
    if "size" not in info.dynamic and asked != info.size:
        kind = "classifier" if info.task == "classify" else "file"
        raise ConfigError(
            f"{weights}: got imgsz {size_text(asked)}, but this {kind} runs at {size_text(info.size)} only; leave out"
        )
    return size


def _multiple_of(stride: int, side: int) -> int:
    return -(-side // stride) * stride
