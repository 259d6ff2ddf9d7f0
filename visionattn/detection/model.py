"""YOLO-LAT: the model class and its packaged yamls."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.nn.tasks import yaml_model_load

from visionattn.detection.trainer import LATTrainer
from visionattn.errors import ConfigError, UnknownNameError, UnsupportedError, suggest
from visionattn.packaged import find_packaged, packaged

MODELS: dict[str, Path] = packaged("models")
"""Packaged model yamls by name."""

WEIGHTS: dict[str, Path] = packaged("weights")
"""Packaged weights by name."""


def resolve_model(model: str | Path) -> str:
    """Return the path of a packaged model (``yolo-lat-n``, with or without ``.yaml``) or of weights by name.

    A file that exists goes before a packaged one; anything else is returned as it is.

    Raises:
        UnknownNameError: the name begins like one of ours, but there is neither such a model nor such a file.
    """
    found = find_packaged("models", model) or find_packaged("weights", model)
    if found:
        return str(found)
    name = str(model).removesuffix(".yaml")
    if name.startswith("yolo-lat") and not Path(model).exists():
        raise UnknownNameError(f"unknown model {str(model)!r}; {suggest(name, (*MODELS, *WEIGHTS))}")
    return str(model)


def fingerprint(model: str) -> str:
    """Return a digest of what a training begins with: the rows of a yaml, whatever its name, or the bytes of weights.

    Raises:
        UnknownNameError: as :func:`resolve_model`.
        ConfigError: there is no such model.
    """
    path = resolve_model(model)
    try:
        if path.endswith(".pt"):
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()
        content = {key: value for key, value in yaml_model_load(path).items() if key != "yaml_file"}
    except Exception as error:  # Ultralytics asserts that a name ends as one of a yaml
        raise ConfigError(
            f"model {model!r} cannot be read ({error}); give a packaged name, a model yaml or a .pt file"
        ) from error
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class YOLOLAT(YOLO):
    """``ultralytics.YOLO`` that knows our models by name and trains with checkpoints that survive a kill.

    Args:
        model: a packaged name (``yolo-lat-n``) or that of weights (``yolo-lat-n-aquarium``), a model yaml, a ``.pt``
            checkpoint or an exported model.
        task: as in Ultralytics; found out from the model if None.
        verbose: print the model's summary.
    """

    def __init__(self, model: str | Path = "yolo-lat-n", task: str | None = None, verbose: bool = False) -> None:
        super().__init__(resolve_model(model), task=task, verbose=verbose)

    @property
    def task_map(self) -> dict[str, dict[str, Any]]:
        """Ultralytics' classes by task, with our trainer for detection."""
        classes: dict[str, dict[str, Any]] = super().task_map
        classes["detect"]["trainer"] = LATTrainer
        return classes

    def track(self, *args: Any, **kwargs: Any) -> Any:
        """Track objects over the frames of a video; arguments as in Ultralytics.

        Raises:
            UnsupportedError: the package that Ultralytics' trackers need is not installed.
        """
        check_tracking()
        return super().track(*args, **kwargs)


def check_tracking() -> None:
    """Say what tracking lacks before a stream is opened: Ultralytics would fail for want of a module."""
    if importlib.util.find_spec("lap") is None:
        raise UnsupportedError(
            "tracking needs the package lap, which is not installed; pip install 'visionattn[track]'"
        )


def yolo_command(arguments: list[str]) -> None:
    """Run Ultralytics' ``yolo`` command with our blocks and model names known."""
    from ultralytics.cfg import entrypoint

    if "track" in arguments:
        check_tracking()
    known = [f"model={resolve_model(a[6:])}" if a.startswith("model=") else a for a in arguments]
    sys.argv[:] = ["yolo", *known]  # in place: Ultralytics keeps the list itself
    entrypoint()
