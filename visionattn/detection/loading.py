"""Loading ``.pt`` checkpoints as data: restricted unpickling unless the user vouches for the file."""

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint
from ultralytics.nn import tasks
from ultralytics.nn.modules import Detect

from visionattn.detection.model import YOLOLAT, resolve_model
from visionattn.errors import ConfigError, WeightsError

_SWITCH = "ULTRALYTICS_SAFE_LOAD"


def load_detector(weights: str | Path, trust: bool = False) -> YOLOLAT:
    """Load a ``.pt`` detector without running code that a stranger put into it.

    Args:
        weights: checkpoint written by Ultralytics' trainer, or the name of weights in :data:`WEIGHTS`.
        trust: load it as a plain pickle, which may run any code; for files of your own that name foreign classes.

    Raises:
        WeightsError: missing, damaged, no detector, or in need of classes that are not known to be safe.
    """
    weights = Path(resolve_model(weights))
    read_checkpoint(weights, trust)
    try:
        with restricted(not trust):
            model = YOLOLAT(weights)
    except Exception as error:
        raise WeightsError(f"{weights} cannot be rebuilt as a detector: {error}") from error
    if model.task != "detect":
        raise WeightsError(f"{weights}: got a model for the task {model.task!r}, expected a detector")
    try:
        check_head(model)
    except ConfigError as error:
        raise WeightsError(f"{weights}: {error}") from error
    return model


def check_head(detector: YOLOLAT) -> None:
    """Refuse a detector whose head is none of those whose boxes are read and trained here, such as RT-DETR's.

    Raises:
        ConfigError: names the head.
    """
    network: Any = detector.model
    head = network.model[-1]
    if not isinstance(head, Detect):
        raise ConfigError(
            f"its head is {type(head).__name__}, which gives boxes in another form and is trained another way; only "
            "heads of the kind Detect are read here: use Ultralytics itself, or another model"
        )


def read_checkpoint(weights: Path, trust: bool = False) -> dict[str, Any]:
    """Return the content of a checkpoint of Ultralytics' form; arguments and errors as :func:`load_detector`."""
    if not weights.is_file():
        raise WeightsError(f"weights not found: {weights}; give a .pt file, e.g. runs/detect/NAME/weights/best.pt")
    try:
        checkpoint, _ = tasks.torch_safe_load(weights, safe_only=not trust)
    except Exception as error:
        if zipfile.is_zipfile(weights) and isinstance(error.__cause__ or error, pickle.UnpicklingError):
            names = ", ".join(get_unsafe_globals_in_checkpoint(weights))
            raise WeightsError(
                f"{weights} asks for code outside the known model classes ({names}), so it was not loaded; if the "
                "file is your own, pass --trust-weights"
            ) from error
        raise WeightsError(
            f"{weights} is damaged or no PyTorch checkpoint; give a .pt file that our training wrote"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("ema") or checkpoint.get("model"), nn.Module):
        raise WeightsError(
            f"{weights} is a PyTorch file, but holds no Ultralytics model; give a .pt file that our training wrote"
        )
    return checkpoint


@contextmanager
def restricted(on: bool) -> Iterator[None]:
    """Switch Ultralytics' restricted loading, in this process and in the workers it starts."""
    before, variable = tasks.SAFE_LOAD, os.environ.get(_SWITCH)
    tasks.SAFE_LOAD, os.environ[_SWITCH] = on, str(on).lower()
    try:
        yield
    finally:
        tasks.SAFE_LOAD = before
        if variable is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = variable
