"""Where frames come from: a picture, a folder of pictures, a video, or a camera."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import cv2

from visionattn.data import IMAGE_SUFFIXES, load_image
from visionattn.data.embedded import EMBEDDED, embedded_pictures
from visionattn.data.files import list_images
from visionattn.deployment import BGRImage
from visionattn.errors import DataError, SourceError

FALLBACK_FPS = 25.0
"""For videos and cameras that do not tell their rate."""

_log = logging.getLogger("visionattn")


@dataclass(frozen=True)
class Source:
    """Iterates once over (name, frame); a picture's name is its path below the source, others are numbered.

    Attributes:
        kind: what it is.
        name: short name for the output.
        frames: what is iterated over; raises SourceError if not one frame can be read.
        files: the files that are read.
        root: folder that the names of pictures count from.
        count: how many frames there should be; None if it is not known.
        fps: frames per second.
    """

    kind: Literal["image", "folder", "video", "camera"]
    name: str
    frames: Iterator[tuple[str, BGRImage]]
    files: tuple[Path, ...] = ()
    root: Path = Path()
    count: int | None = None
    fps: float = FALLBACK_FPS

    @cached_property
    def resolved(self) -> frozenset[Path]:
        """The files that are read, without links."""
        return frozenset(file.resolve() for file in self.files)

    def __iter__(self) -> Iterator[tuple[str, BGRImage]]:
        return self.frames


def open_source(text: str) -> Source:
    """Open what ``text`` names: a picture, a folder of pictures, a video or gif, or a camera by its number.

    The name of an embedded data set stands for its val pictures.

    A broken picture of a folder is left out with a warning.

    Raises:
        SourceError: it is not there, holds no pictures, or cannot be decoded.
    """
    if not text.strip():
        raise SourceError("source is empty; give a picture, a folder (. for this one), a video, or a camera's number")
    path = embedded_pictures(text) if text in EMBEDDED else Path(text).absolute()
    if text.isascii() and text.isdigit() and not path.exists():
        return _camera(int(text))
    if path.is_dir():
        files = list_images(path)
        if not files:
            raise SourceError(f"no pictures in {path}; suffixes known: {' '.join(sorted(IMAGE_SUFFIXES))}")
        name = text if text in EMBEDDED else path.name
        return Source("folder", name, _pictures(files, path), tuple(files), path, len(files))
    if not path.is_file():
        raise SourceError(
            f"source not found: {text}; give a picture, a folder, a video, or a camera's number such as 0"
        )
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return Source("image", path.stem, _pictures([path], path.parent), (path,), path.parent, 1)
    return _video(path)


def _pictures(files: Sequence[Path], root: Path) -> Iterator[tuple[str, BGRImage]]:
    faults = []
    for file in files:
        try:
            picture = load_image(file)
        except DataError as error:
            faults.append(str(error))
            if len(files) > 1:
                _log.warning("left out: %s", error)
            continue
        yield str(file.relative_to(root)), picture
    if len(faults) == len(files):
        raise SourceError(faults[0] if len(files) == 1 else f"none of the {len(files)} pictures in {root} can be read")


def _camera(number: int) -> Source:
    capture = _open(number)
    if capture is None:
        raise SourceError(
            f"camera {number} cannot be opened; check that it is plugged in, not in use, and that you may read it, "
            "or give a picture, a folder or a video"
        )
    return Source("camera", f"camera{number}", _frames(capture, f"camera {number}", None), fps=_fps(capture))


def _video(path: Path) -> Source:
    capture = _open(str(path))
    if capture is None:
        raise SourceError(f"{path} can be decoded neither as a picture nor as a video; convert it to png or mp4")
    count = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None
    return Source("video", path.stem, _frames(capture, str(path), count), (path,), path.parent, count, _fps(capture))


def _open(what: int | str) -> Any | None:
    """Open a video or a camera without OpenCV's own messages; None if that fails."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(0)
    try:
        capture = cv2.VideoCapture(what)
    finally:
        cv2.utils.logging.setLogLevel(level)
    return capture if capture.isOpened() else None


def _fps(capture: Any) -> float:
    fps = float(capture.get(cv2.CAP_PROP_FPS))
    return fps if 0 < fps <= 1000 else FALLBACK_FPS


def _frames(capture: Any, name: str, count: int | None) -> Iterator[tuple[str, BGRImage]]:
    read = 0
    try:
        while (grabbed := capture.read())[0]:
            yield f"{read:06d}", grabbed[1]
            read += 1
    finally:
        capture.release()
    if not read:
        raise SourceError(f"{name}: not one frame can be read")
    if read < 0.9 * (count or 0):
        _log.warning("%s: only %d of about %d frames can be decoded", name, read, count)
