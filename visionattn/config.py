"""Training configurations: a YAML file plus ``key.sub=value`` overrides in, a checked model out.

Every key is declared here, except the two mappings ``ultralytics:`` and ``timm:``, which are handed to those libraries
as they are.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from visionattn.errors import ConfigError, suggest
from visionattn.packaged import find_packaged, packaged


def _device(value: Any) -> Any:
    """Let YAML's ``0`` and ``[0, 1]`` stand for ``"0"`` and ``"0,1"``."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value) if type(value) is int else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Common(_Strict):
    """Keys that both tasks share."""

    model: str = Field(description="a model name, a model yaml, or weights to start from")
    data: str = Field(description="an embedded set (digits, digits-scenes), a data.yaml or a folder of class folders")
    name: str = Field(default="", description="name of the run folder; the config's file name if empty")
    output: Path = Field(default=Path("runs"), description="run folders are made below this folder")
    epochs: int = Field(default=100, ge=1)
    batch: int = Field(default=16, ge=1, description="images per step; a classifier's, in each process")
    imgsz: int = Field(default=320, ge=32, description="side of the square training image, in pixels")
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: Annotated[str, BeforeValidator(_device)] = Field(
        default="", description="cpu, 0, 0,1, ...; empty: the best one there is"
    )
    workers: int = Field(default=4, ge=0, description="loader processes")
    skip_broken: bool = Field(default=False, description="train without unreadable images and malformed labels")
    augment: list[dict[str, dict[str, Any]]] | None = Field(
        default=None, description="albumentations transforms by name, e.g. [{HorizontalFlip: {p: 0.5}}]"
    )


class DetectConfig(_Common):
    """A detector trained by Ultralytics."""

    task: Literal["detect"]
    imgsz: int = Field(
        default=320, ge=64, description="side of the square training image, in pixels; at least two cells of stride 32"
    )
    loader: Literal["workers", "device"] = Field(
        default="workers", description="where batches are made: by Ultralytics in processes, or on the training device"
    )
    ultralytics: dict[str, Any] = Field(default_factory=dict, description="passed to Ultralytics' trainer")


class TimmOptions(_Strict):
    """Keyword arguments of the timm functions of the same purpose."""

    model: dict[str, Any] = Field(default_factory=dict, description="timm.create_model")
    optimizer: dict[str, Any] = Field(default_factory=dict, description="timm.optim.create_optimizer_v2")
    scheduler: dict[str, Any] = Field(default_factory=dict, description="timm.scheduler.create_scheduler_v2")
    mixup: dict[str, Any] = Field(default_factory=dict, description="timm.data.Mixup; off if empty")
    ema: dict[str, Any] = Field(default_factory=dict, description="timm.utils.ModelEmaV3; off if empty")


class ClassifyConfig(_Common):
    """A classifier trained with timm's parts."""

    task: Literal["classify"]
    amp: Literal["no", "fp16", "bf16"] = Field(default="no", description="accelerate's mixed precision")
    timm: TimmOptions = Field(default_factory=TimmOptions)


TrainConfig = DetectConfig | ClassifyConfig
_ADAPTER: TypeAdapter[TrainConfig] = TypeAdapter(Annotated[TrainConfig, Field(discriminator="task")])
_MODELS: dict[str, type[_Strict]] = {"detect": DetectConfig, "classify": ClassifyConfig, "timm": TimmOptions}


def load_config(
    path: str | Path, overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read and check a training configuration.

    Args:
        path: YAML file, or the name of a packaged one such as ``detect/digits``.
        overrides: ``key.sub=value`` strings; values are read as YAML, so ``lr=1e-3`` and ``flip=[a, b]`` work.
        changes: keys and values that :func:`merged` puts over those of the file.

    Raises:
        ConfigError: the file is missing or no mapping, or a key or a value is refused (named by its dotted path).
    """
    given, path = path, find_packaged("configs", path) or Path(path)
    if not path.is_file():
        raise ConfigError(
            f"config file not found: {given}; give a YAML file, or a packaged one: {', '.join(packaged('configs'))}"
        )
    try:
        raw = _Loader.parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: got {type(raw).__name__}, expected a mapping of keys such as task, model, data")
    for override in overrides:
        _set(raw, override)
    raw = merged(raw, changes or {})
    raw.setdefault("name", "")
    raw["name"] = raw["name"] or path.stem
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], origin: str = "config") -> TrainConfig:
    """Check a configuration that is already a mapping; ``origin`` names it in errors."""
    try:
        config = _ADAPTER.validate_python(raw)
    except ValidationError as error:
        lines = [_explain(e, raw) for e in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from error
    return config.model_copy(update={"data": expand(config.data), "model": expand(config.model)})


def merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with some keys changed; of a mapping inside it only the keys that the change has."""
    made = dict(content)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
        made[key] = merged(made[key], value) if both else value
    return made


def expand(text: str) -> str:
    """Replace ``$NAME`` and ``${NAME}`` by environment variables; a variable that is not set is a ConfigError."""
    expanded = os.path.expandvars(str(Path(text).expanduser()) if text.startswith("~") else text)
    missing = re.search(r"\$\{?(\w+)\}?", expanded)
    if missing:
        raise ConfigError(f"{text}: the environment variable {missing[1]} is not set; set it or give a plain path")
    return expanded


def _set(raw: dict[str, Any], override: str) -> None:
    dotted, equals, value = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override}: expected key.sub=value, e.g. --set epochs=50")
    *parents, last = dotted.split(".")
    node = raw
    for key in parents:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {key} is a value, not a mapping, so it has no key below it")
        node = child
    try:
        node[last] = _Loader.parse(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML as people type it: ``1e-3`` is a number, as in YAML 1.2."""

    @staticmethod
    def parse(text: str) -> Any:
        return yaml.load(text, Loader=_Loader)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _explain(error: Any, raw: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    if location and location[0] in ("detect", "classify"):
        location = location[1:]
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        scope = location[-2] if len(location) > 1 else str(raw.get("task"))
        return f"unknown key {dotted}; {suggest(location[-1], _MODELS[scope].model_fields)}"
    if error["type"].startswith("union_tag"):
        return f"task: got {raw.get('task')!r}, expected detect or classify"
    if error["type"] == "missing":
        return f"missing key {dotted}"
    return f"{dotted}: got {error['input']!r}, {error['msg'].lower()}"
