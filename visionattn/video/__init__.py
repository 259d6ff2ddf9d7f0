"""Running a model on pictures, videos and cameras, and drawing what it finds."""

from visionattn.video.predict import Summary, predict
from visionattn.video.source import Source, open_source

__all__ = ["Source", "Summary", "open_source", "predict"]
