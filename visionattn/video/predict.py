"""Running a model on a source and writing what it finds."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from visionattn.deployment import Detections, Runner
from visionattn.errors import UnsupportedError
from visionattn.video.draw import draw
from visionattn.video.sink import Window, open_sink
from visionattn.video.source import Source


@dataclass(frozen=True)
class Summary:
    """What a prediction did.

    Attributes:
        frames: frames processed.
        counts: class name -> boxes, or frames whose most probable class it was; the most frequent first.
        model_ms: milliseconds a frame in the model with its pre- and post-processing; a first call is not counted.
        total_ms: the same with reading, drawing, writing and showing.
        paths: files written.
        device: where the model ran.
    """

    frames: int
    counts: dict[str, int]
    model_ms: float
    total_ms: float
    paths: list[Path]
    device: str


def predict(runner: Runner, source: Source, output: Path, show: bool = False) -> Summary:
    """Run ``runner`` on every frame of ``source`` and write the frames with what was found drawn into them.

    A camera runs until Ctrl-C, or until q or Esc in its window.

    Args:
        runner: model from :func:`visionattn.deployment.load_runner`.
        source: from :func:`visionattn.video.open_source`.
        output: folder for the pictures or the mp4 video; files that are there are never replaced.
        show: also show the frames in a window; pictures wait for a key.

    Raises:
        SourceError: the source cannot be read, or the output cannot be written.
        ConfigError: a file that would be written is there already.
        UnsupportedError: the model is a bare backbone, or ``show`` where no window can be opened.
    """
    if runner.task == "features":
        raise UnsupportedError(
            f"{runner.info.model} is a backbone, which finds nothing to draw; give a detector or classifier"
        )
    window = Window(source.name, wait=source.kind in ("image", "folder")) if show else None
    counts: Counter[str] = Counter()
    frames, in_model, started = 0, 0.0, 0.0
    with open_sink(source, output) as sink:
        try:
            for name, frame in tqdm(source, total=source.count, unit="frame", leave=False, disable=None):
                if not frames:
                    runner([frame])  # warm-up
                    started = time.perf_counter()
                before = time.perf_counter()
                result = runner([frame])[0]
                in_model += time.perf_counter() - before
                frames += 1
                counts.update(_found(result, runner.names))
                drawn = draw(frame, result, runner.names)
                sink.write(name, drawn)
                if window and not window.show(drawn):
                    break
        except KeyboardInterrupt:
            if source.kind != "camera":
                raise
        total = time.perf_counter() - started
    milliseconds = 1000 / max(frames, 1)
    return Summary(
        frames, dict(counts.most_common()), in_model * milliseconds, total * milliseconds, sink.paths, runner.device
    )


def _found(result: Detections | NDArray[np.float32], names: dict[int, str]) -> list[str]:
    indices = result.classes if isinstance(result, Detections) else [result.argmax()]
    return [names[int(index)] for index in indices]
