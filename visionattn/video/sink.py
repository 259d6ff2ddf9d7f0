"""Where drawn frames go: pictures, a video, a window."""

import os
import subprocess
import sys
from abc import abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2

from visionattn.atomic import whole
from visionattn.deployment import BGRImage
from visionattn.errors import ConfigError, SourceError, UnsupportedError
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
        self._folder = folder
        _check_free([folder / _picture_name(file.relative_to(source.root)) for file in source.files], source)

    def write(self, name: str, frame: BGRImage) -> None:
        """Write one picture."""
        path = self._folder / _picture_name(Path(name))
        encoded, content = cv2.imencode(path.suffix, frame)  # OpenCV itself would not say that a disk is full
        if not encoded:
            raise SourceError(f"{path} cannot be written: OpenCV cannot make a {path.suffix} of {frame.shape}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            partial.write_bytes(content.data)
        self.paths.append(path)


class VideoSink(Sink):
    """One mp4 video of the first frame's size; an odd last row or column is cut off, as the codec wants even sides."""

    def __init__(self, folder: Path, source: Source) -> None:
        super().__init__()
        self._path = folder / f"{source.name}.mp4"
        _check_free([self._path], source)
        self._partial = self._path.with_name(f".{source.name}.{os.getpid()}.partial.mp4")
        self._fps = source.fps
        self._writer: Any = None
        self._frames = 0

    def write(self, name: str, frame: BGRImage) -> None:
        """Append one frame."""
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._partial), codec, self._fps, (frame.shape[1], frame.shape[0]))
            if not self._writer.isOpened():
                raise self._failed("check the disk, or whether OpenCV can encode mp4")
        self._writer.write(frame)
        self._frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Move the video into place, or remove what there is of it.

        Raises:
            SourceError: it cannot be read again.
        """
        if self._writer is None:
            return
        self._writer.release()
        try:
            if kind is None:
                self._read_again()
                self._partial.replace(self._path)
                self.paths.append(self._path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _read_again(self) -> None:
        """See that the file has all frames: of what fails while it writes, a full disk say, OpenCV tells nothing.

        Its encoder writes nothing more after a first failure, and the list of frames comes last, so that a file in
        which anything is missing has no such list.
        """
        video = cv2.VideoCapture(str(self._partial))
        found = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
        video.release()
        if found != self._frames:
            raise self._failed(f"of {self._frames} frames {found} can be read; is the disk full?")

    def _failed(self, why: str) -> SourceError:
        return SourceError(f"{self._path} cannot be written: {why}")


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


def _picture_name(name: Path) -> Path:
    """Return the name to write a picture under: its own, or with ``.png`` where OpenCV cannot write such."""
    return name if cv2.haveImageWriter(name.name) else name.with_name(f"{name.name}.png")


def _check_free(paths: list[Path], source: Source) -> None:
    """Raise before anything is written if a file is there already: one of the source's, or of an earlier run."""
    for path in paths:
        if path.resolve() in source.resolved:
            raise SourceError(f"{path} is being read and would be replaced; give another --output folder")
    there = [path for path in paths if path.exists()]
    if there:
        raise ConfigError(
            f"{there[0]}{f' and {len(there) - 1} more' if there[1:] else ''} would be replaced; give another --output "
            "folder, or remove what is there"
        )
