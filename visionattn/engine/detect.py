"""Training a detector from a configuration."""

from typing import Any

from visionattn.config import DetectConfig
from visionattn.data import build_augment, check_data, load_detection_data, write_data_yaml
from visionattn.detection import build_detector, check_options, refuse_unsupported, train_detector, why_left_out
from visionattn.engine.evaluate import evaluate
from visionattn.engine.run import RunFolder
from visionattn.errors import ConfigError


def train_detect(config: DetectConfig, run: RunFolder, trust: bool = False) -> dict[str, Any]:
    """Train as ``config`` says in the folder ``run``; return the COCO metrics of the best weights on the val split.

    Raises:
        ConfigError: an option or the model is unknown; like the next two, before anything is written.
        DataError: the data set is missing, incomplete or damaged.
        WeightsError: the weights to start from cannot be loaded.
    """
    check_options(config.ultralytics, config.device)
    augmentations = None if config.augment is None else build_augment(config.augment)
    if config.loader == "device":
        refuse_unsupported({**config.ultralytics, "augmentations": augmentations})
    data = check_data(load_detection_data(config.data), ("train", "val"), config.skip_broken, why_left_out)
    detector = build_detector(config.model, trust)
    fresh = not run.path.exists()
    run.create(config)
    options = {
        "data": str(write_data_yaml(data, run.path / "data")),
        "augmentations": augmentations,
        **config.model_dump(include={"epochs", "batch", "imgsz", "seed", "workers"}),
        **({"device": config.device} if config.device else {}),
        **config.ultralytics,
    }
    try:
        best = train_detector(detector, run.path, trust, config.loader, **options)
    except (TypeError, ValueError, NotImplementedError, FileNotFoundError) as error:
        if fresh and not any(run.weights.iterdir()):
            run.abandon()
            raise ConfigError(f"Ultralytics cannot begin this training: {error}") from error
        raise
    report = evaluate(best, options["data"], imgsz=config.imgsz, device=scoring_device(config.device), trust=trust)
    return report.metrics


def scoring_device(device: str) -> str:
    """Return the first of the devices that were trained on; Ultralytics' -1, one that is idle, is left open."""
    first = device.partition(",")[0].strip()
    return "" if first.startswith("-") else first
