"""The folder of a run: what was asked, where it ran, what came out."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from visionattn.config import TrainConfig
from visionattn.data.files import write_text
from visionattn.errors import ConfigError
from visionattn.record import environment

_MAY_CHANGE = {"device", "workers", "output"}
"""Keys that a resumed run may have changed: they do not change what is computed."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder: ``config.yaml``, ``environment.json``, ``weights/``, and at the end ``metrics.json``.

    Attributes:
        path: of the folder, absolute.
    """

    path: Path

    @classmethod
    def open(cls, config: TrainConfig, resume: bool) -> "RunFolder":
        """Return the folder ``output/task/name`` of a configuration; nothing is written.

        Raises:
            ConfigError: the folder is in use and ``resume`` is off, it belongs to another configuration, or the name is
                no file name.
        """
        if config.name in ("", "..") or Path(config.name).name != config.name:
            raise ConfigError(f"name: got {config.name!r}, expected a plain folder name, e.g. --set name=digits-1")
        run = cls((config.output / config.task / config.name).absolute())
        if not run.path.exists():
            return run
        if not run.path.is_dir():
            raise ConfigError(f"{run.path} is a file; choose another name (--set name=...) or output")
        if not resume and any(run.path.iterdir()):
            raise ConfigError(
                f"the run folder {run.path} is in use; go on with --resume, choose another name (--set name=...) or "
                "delete the folder"
            )
        if any(run.path.iterdir()) and not (run.path / "config.yaml").is_file():
            raise ConfigError(f"{run.path} holds no run of ours to resume; choose another name (--set name=...)")
        changed = run._changed(config)
        if changed:
            raise ConfigError(
                f"{run.path} was started with another configuration ({'; '.join(changed)}); resume with the one it was "
                "started with, or choose another name (--set name=...)"
            )
        return run

    @property
    def weights(self) -> Path:
        """The folder of weights."""
        return self.path / "weights"

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What a finished run came to, None before."""
        file = self.path / "metrics.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def create(self, config: TrainConfig) -> None:
        """Make the folder, write ``environment.json`` and the resolved ``config.yaml``, which trains the same again."""
        if not is_main_process():
            return
        self.weights.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "environment.json", environment())
        write_text(self.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    def abandon(self) -> None:
        """Remove the folder of a run that could not begin."""
        shutil.rmtree(self.path)

    def finished(self, metrics: dict[str, Any]) -> None:
        """Write ``metrics.json``, which marks the run as finished."""
        if is_main_process():
            write_json(self.path / "metrics.json", metrics)

    def _changed(self, config: TrainConfig) -> list[str]:
        file = self.path / "config.yaml"
        if not file.is_file():
            return []
        before, now = yaml.safe_load(file.read_text(encoding="utf-8")), config.model_dump(mode="json")
        keys = [key for key in now if key not in _MAY_CHANGE and before.get(key) != now[key]]
        return [f"{key}: was {before.get(key)!r}, now {now[key]!r}" for key in keys]


def is_main_process() -> bool:
    """Whether this is the process that writes and reports: the only one, or the first one of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")
