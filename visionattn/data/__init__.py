"""Data sets: embedded ones that need no download, and the user's own, read and checked before anything is trained."""

from visionattn.data.augment import build_augment, variants
from visionattn.data.calibration import calibration_images
from visionattn.data.classification import ClassificationData, check_images, load_classification_data
from visionattn.data.coco import coco_ground_truth, write_coco
from visionattn.data.detection import (
    DetectionData,
    Problem,
    check_data,
    find_problems,
    load_detection_data,
    write_data_yaml,
)
from visionattn.data.embedded import EMBEDDED, embedded_path
from visionattn.data.files import IMAGE_SUFFIXES
from visionattn.data.labels import label_path
from visionattn.data.unlabelled import Unlabelled, parquet_reader, unlabelled_images
from visionattn.pictures import load_image

__all__ = [
    "EMBEDDED",
    "IMAGE_SUFFIXES",
    "ClassificationData",
    "DetectionData",
    "Problem",
    "Unlabelled",
    "build_augment",
    "calibration_images",
    "check_data",
    "check_images",
    "coco_ground_truth",
    "embedded_path",
    "find_problems",
    "label_path",
    "load_classification_data",
    "load_detection_data",
    "load_image",
    "parquet_reader",
    "unlabelled_images",
    "variants",
    "write_coco",
    "write_data_yaml",
]
