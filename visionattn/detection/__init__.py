"""YOLO-LAT detectors in Ultralytics' model-yaml system. The only room that imports Ultralytics.

Importing it makes our blocks known to Ultralytics' yaml parser. The import stands in the package itself because a
checkpoint is a pickle that imports the parents of the modules it names: loading one registers the blocks by itself.
Before that, :mod:`visionattn.detection.host` settles what Ultralytics may do to the user's machine and data.
"""

from visionattn.detection.host import settle, why_left_out

settle()

from visionattn.detection.blocks import LAT, LATFeatures, LinearDetect, PredictionConv, Rep  # noqa: E402  (settled first)
from visionattn.detection.registration import register  # noqa: E402

register([LAT, LATFeatures, LinearDetect, Rep], parts=[PredictionConv])

from visionattn.detection.augment import try_augmentations  # noqa: E402
from visionattn.detection.boxes import check_form, in_image, letterbox, suppress  # noqa: E402  (models need registered blocks)
from visionattn.detection.controls import ablated, narrow_control  # noqa: E402
from visionattn.detection.device_loader import refuse_unsupported  # noqa: E402
from visionattn.detection.loading import load_detector  # noqa: E402
from visionattn.detection.model import MODELS, WEIGHTS, YOLOLAT, fingerprint, resolve_model, yolo_command  # noqa: E402
from visionattn.detection.network import DetectionNetwork, classes_and_size  # noqa: E402
from visionattn.detection.training import build_detector, check_freeze, check_side, checked_options, train_detector  # noqa: E402

__all__ = [
    "LAT",
    "MODELS",
    "WEIGHTS",
    "YOLOLAT",
    "DetectionNetwork",
    "LATFeatures",
    "LinearDetect",
    "Rep",
    "ablated",
    "build_detector",
    "check_form",
    "check_freeze",
    "check_side",
    "checked_options",
    "classes_and_size",
    "fingerprint",
    "in_image",
    "letterbox",
    "load_detector",
    "narrow_control",
    "refuse_unsupported",
    "resolve_model",
    "suppress",
    "train_detector",
    "try_augmentations",
    "why_left_out",
    "yolo_command",
]
