"""Training from a configuration, whatever the task."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionattn.config import ClassifyConfig, DetectConfig, TrainConfig
from visionattn.engine.classify import train_classify
from visionattn.engine.detect import train_detect
from visionattn.engine.run import RunFolder
from visionattn.errors import ConfigError, VisionAttnError

_TASKS: dict[type[TrainConfig], tuple[Callable[..., dict[str, Any]], str]] = {
    DetectConfig: (train_detect, "best.pt"),
    ClassifyConfig: (train_classify, "best.safetensors"),
}


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    Attributes:
        folder: of the run.
        weights: the best ones.
        metrics: of these weights on the val split, as in ``metrics.json``.
    """

    folder: Path
    weights: Path
    metrics: dict[str, Any]


def train(config: TrainConfig, resume: bool = False, trust: bool = False) -> TrainResult:
    """Train as ``config`` says; everything is checked before anything is written.

    Args:
        config: what to train, from :func:`visionattn.config.load_config`.
        resume: go on with a run that was stopped; at most one epoch is trained again, or twenty seconds of a detector
            whose epochs are not scored. A finished run is left as it is, and a run that was not begun begins.
        trust: load a detector's checkpoints as plain pickles, which may run any code.

    Raises:
        ConfigError: an option, the model or the run folder does not fit.
        DataError: the data set is missing, incomplete or damaged.
        WeightsError: the weights to start from cannot be loaded.
    """
    run = RunFolder.open(config, resume)
    task, weights = _TASKS[type(config)]
    metrics = run.metrics
    if metrics is None:
        with run.held(resume):
            metrics = _train(task, config, run, trust)
    return TrainResult(run.path, run.weights / weights, metrics)


def _train(task: Callable[..., dict[str, Any]], config: TrainConfig, run: RunFolder, trust: bool) -> dict[str, Any]:
    """Train and note the metrics; whatever a library says before there is a checkpoint is about what it was given."""
    try:
        metrics = run.metrics or task(config, run, trust)
    except (VisionAttnError, OSError):
        raise
    except Exception as error:
        if run.begun:
            raise
        raise ConfigError(f"this training cannot begin: {type(error).__name__}: {error}") from error
    run.finished(metrics)
    return metrics
