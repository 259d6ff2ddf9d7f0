"""Where drawn frames go: pictures, a video, a window."""

import subprocess
import sys
from abc import abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2

from visionattn.errors import SourceError, UnsupportedError
from visionattn.export import BGRImage
from visionattn.video.source import Source


class Sink(AbstractContextManager["Sink"]):
    """Takes frames; at the end of its ``with`` block its files are whole, after an error half of one is removed.

    Attributes:
        paths: files written, all of them whole.
    """

    def __init__(self) -> None:
        self.paths: list[Path] = []

    @abstractmethod
    def write(self, name: str, frame: BGRImage) -> None:
        """Write one frame.

        Raises:
            SourceError: it cannot be written, or would replace a file that is being read.
        """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish."""


class PictureSink(Sink):
    """A picture a frame under the frame's own name; ``.png`` is added to names that OpenCV cannot write."""

    def __init__(self, folder: Path, source: Source) -> None:
        super().__init__()
        self._folder, self._source = folder, source

    def write(self, name: str, frame: BGRImage) -> None:
        """Write one picture."""
        path = self._folder / (name if cv2.haveImageWriter(name) else f"{name}.png")
        partial = _prepare(path, self._source)
        if not cv2.imwrite(str(partial), frame):
            raise SourceError(f"{path} cannot be written; check the disk and the permissions of {path.parent}")
        partial.replace(path)
        self.paths.append(path)


class VideoSink(Sink):
    """One mp4 video of the first frame's size; an odd last row or column is cut off, as the codec wants even sides."""

    def __init__(self, folder: Path, source: Source) -> None:
        super().__init__()
        self._path = folder / f"{source.name}.mp4"
        self._partial = _prepare(self._path, source)
        self._fps = source.fps
        self._writer: Any = None

    def write(self, name: str, frame: BGRImage) -> None:
        """Append one frame."""
        if self._writer is None:
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._partial), codec, self._fps, (frame.shape[1], frame.shape[0]))
            if not self._writer.isOpened():
                raise SourceError(f"{self._path} cannot be written; check the disk, or whether OpenCV can encode mp4")
        self._writer.write(frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Move the video into place, or remove what there is of it."""
        if self._writer is None:
            return
        self._writer.release()
        if kind is None:
            self._partial.replace(self._path)
            self.paths.append(self._path)
        else:
            self._partial.unlink(missing_ok=True)


def open_sink(source: Source, folder: Path) -> Sink:
    """Return a sink that suits ``source``: a video for videos and cameras, pictures otherwise."""
    return (VideoSink if source.kind in ("video", "camera") else PictureSink)(folder, source)


class Window:
    """A window that shows frames.

    Args:
        title: shown above it.
        wait: hold each frame until a key is pressed, as for pictures.

    Raises:
        UnsupportedError: no window can be opened here.
    """

    def __init__(self, title: str, wait: bool) -> None:
        _check_windows()
        self._title, self._wait = title, wait

    def show(self, frame: BGRImage) -> bool:
        """Show a frame; False if the user has pressed q or Esc or closed the window."""
        cv2.imshow(self._title, frame)
        while True:
            key = cv2.waitKey(30 if self._wait else 1)
            if key in (ord("q"), 27) or cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1:
                return False
            if not self._wait or key >= 0:
                return True


def _check_windows() -> None:
    """Try in another process: without a display Qt does not raise, it aborts."""
    attempt = "import cv2; cv2.namedWindow('test'); cv2.destroyAllWindows()"
    if subprocess.run([sys.executable, "-c", attempt], capture_output=True).returncode:
        raise UnsupportedError(
            "no window can be opened: there is no display, or OpenCV was built without windows "
            "(opencv-python-headless); leave out --show and look at the files written, or install opencv-python"
        )


def _prepare(path: Path, source: Source) -> Path:
    """Make the folder of ``path``; return the name to write under until the file is whole."""
    if path.resolve() in source.resolved:
        raise SourceError(f"{path} is being read and would be replaced; give another --output folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.stem}.partial{path.suffix}")
