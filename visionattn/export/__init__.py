"""Running trained models, whatever their format: images in, arrays out."""

from visionattn.export.runner import BGRImage, ClassifyRunner, Detections, DetectRunner, Runner, load_runner

__all__ = ["BGRImage", "ClassifyRunner", "DetectRunner", "Detections", "Runner", "load_runner"]
