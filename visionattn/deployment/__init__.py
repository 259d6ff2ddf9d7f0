"""Networks on their way to production: exported, verified, and run by one abstraction, whatever the runtime."""

from visionattn.deployment.inputs import BGRImage
from visionattn.deployment.runner import ClassifyRunner, Detections, DetectRunner, FeaturesRunner, Runner, load_runner

__all__ = [
    "BGRImage",
    "ClassifyRunner",
    "DetectRunner",
    "Detections",
    "FeaturesRunner",
    "Runner",
    "load_runner",
]
