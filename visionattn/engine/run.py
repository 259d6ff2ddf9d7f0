"""The folder of a run: what was asked, where it ran, what came out."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from visionattn.config import TrainConfig
from visionattn.data.files import write_text
from visionattn.errors import ConfigError

_MAY_CHANGE = {"device", "workers", "output"}
"""Keys that a resumed run may have changed: they do not change what is computed."""

_PACKAGES = (
    *("visionattn", "torch", "torchvision", "timm", "ultralytics", "accelerate", "albumentations", "numpy"),
    *("opencv-python", "opencv-python-headless", "pycocotools", "faster-coco-eval"),
)


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


def environment() -> dict[str, Any]:
    """Return what a result depends on besides its configuration: versions, device, commit, command."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": _commit(),
        "device": ", ".join(gpus) or f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}",
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _commit() -> str | None:
    """Return the commit that this package is checked out at, marked if files differ from it, or None.

    A copy without its repository, on a borrowed machine say, may be told it by ``VISIONATTN_COMMIT``.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return os.environ.get("VISIONATTN_COMMIT")
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a folder of someone else's
        return None
