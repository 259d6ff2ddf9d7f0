"""The folder of a run: what was asked, where it ran, what came out."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from visionattn.atomic import write_json, write_text
from visionattn.config import TrainConfig
from visionattn.data.summary import Summary
from visionattn.engine.lock import LOCK, locked
from visionattn.errors import ConfigError
from visionattn.record import environment

_log = logging.getLogger("visionattn")

_MAY_CHANGE = {"device", "workers", "output"}
"""Keys that a resumed run may have changed: they do not change what is computed."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder: ``config.yaml``, ``environment.json``, ``data.json``, ``weights/``, at the end ``metrics.json``.

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
        if not resume and run._content:
            raise run._in_use()
        if run._content and not (run.path / "config.yaml").is_file():
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

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.weights.is_dir() and any(self.weights.iterdir())

    @contextmanager
    def held(self, resume: bool) -> Iterator[None]:
        """Hold the folder, which is made, against other trainings; a start that fails leaves nothing of it behind.

        Raises:
            ConfigError: another training holds it, or has begun in it meanwhile.
        """
        if not is_main_process():
            yield
            return
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            fresh = not self._content
            if not fresh and not resume:
                raise self._in_use()
            try:
                yield
            except Exception:
                if fresh and not self.begun:
                    self._empty()
                    _remove_empty(made)
                raise

    def remember(self, data: Summary) -> None:
        """Write what is trained on into ``data.json``, or see that a run which is resumed is still trained on that.

        Raises:
            ConfigError: the data has changed.
        """
        file = self.path / "data.json"
        if not file.is_file() or not self.begun:
            if self.begun:
                _log.warning(
                    "%s does not say what it was trained on; see to it yourself that it is this data", self.path
                )
            if is_main_process():
                self.path.mkdir(parents=True, exist_ok=True)
                write_text(file, data.model_dump_json(indent=2) + "\n")
            return
        changed = Summary.model_validate_json(file.read_text(encoding="utf-8")).differences(data)
        if changed:
            raise ConfigError(
                f"{self.path} was trained on other data: {'; '.join(changed)}; put the data back as it was to resume, "
                f"or start another run (--set name=...), from weights in {self.weights} if you like (--set model=...)"
            )

    def create(self, config: TrainConfig) -> None:
        """Make the folder, write ``environment.json`` and the resolved ``config.yaml``, which trains the same again."""
        if not is_main_process():
            return
        self.weights.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "environment.json", environment())
        write_text(self.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    def finished(self, metrics: dict[str, Any]) -> None:
        """Write ``metrics.json``, which marks the run as finished."""
        if is_main_process():
            write_json(self.path / "metrics.json", metrics)

    @property
    def _content(self) -> list[Path]:
        """What lies in the folder, the lock aside."""
        return [path for path in self.path.iterdir() if path.name != LOCK]

    def _in_use(self) -> ConfigError:
        return ConfigError(
            f"the run folder {self.path} is in use; go on with --resume, choose another name (--set name=...) or "
            "delete the folder"
        )

    def _empty(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                with suppress(PermissionError):  # the lock, on Windows
                    path.unlink()

    def _changed(self, config: TrainConfig) -> list[str]:
        file = self.path / "config.yaml"
        if not file.is_file():
            return []
        before, now = yaml.safe_load(file.read_text(encoding="utf-8")), config.model_dump(mode="json")
        keys = [key for key in now if key not in _MAY_CHANGE and before.get(key) != now[key]]
        return [f"{key}: was {before.get(key)!r}, now {now[key]!r}" for key in keys]


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to one that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def is_main_process() -> bool:
    """Whether this is the process that writes and reports: the only one, or the first one of torchrun's."""
    return os.environ.get("RANK", "0") == "0"
