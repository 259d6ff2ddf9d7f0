"""Training a detector from a configuration."""

from typing import Any

from visionattn.config import DetectConfig
from visionattn.data import build_augment, check_data, load_detection_data, variants, write_data_yaml
from visionattn.data.summary import summarize_detection
from visionattn.detection import (
    build_detector,
    check_freeze,
    check_side,
    checked_options,
    refuse_unsupported,
    train_detector,
    try_augmentations,
    why_left_out,
)
from visionattn.engine.evaluate import evaluate
from visionattn.engine.run import RunFolder


def train_detect(config: DetectConfig, run: RunFolder, trust: bool = False) -> dict[str, Any]:
    """Train as ``config`` says in the folder ``run``; return the COCO metrics of the best weights on the val split.

    Raises:
        ConfigError: an option or the model is unknown; like the next two, before anything is written.
        DataError: the data set is missing, incomplete or damaged.
        WeightsError: the weights to start from cannot be loaded.
    """
    given = checked_options(config.ultralytics, config.device)
    augmentations = None if config.augment is None else build_augment(config.augment)
    for variant in variants(augmentations or []):
        try_augmentations(variant, config.imgsz)
    if config.loader == "device":
        refuse_unsupported({**given, "augmentations": augmentations})
    data = check_data(load_detection_data(config.data), ("train", "val"), config.skip_broken, why_left_out)
    detector = build_detector(config.model, trust)
    check_side(detector, config.imgsz)
    check_freeze(detector, given.get("freeze"))
    run.remember(summarize_detection(data, ("train", "val")))
    run.create(config)
    options = {
        "data": str(write_data_yaml(data, run.path / "data")),
        "augmentations": augmentations,
        **config.model_dump(include={"epochs", "batch", "imgsz", "seed", "workers"}),
        **({"device": config.device} if config.device else {}),
        **given,
    }
    best = train_detector(detector, run.path, trust, config.loader, **options)
    report = evaluate(best, options["data"], imgsz=config.imgsz, device=scoring_device(config.device), trust=trust)
    return report.metrics


def scoring_device(device: str) -> str:
    """Return the first of the devices that were trained on; Ultralytics' -1, one that is idle, is left open."""
    first = device.partition(",")[0].strip()
    return "" if first.startswith("-") else first
