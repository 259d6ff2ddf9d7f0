"""Classifiers of timm: built from names and options, kept in one safetensors file that says how to build them again."""

import logging
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from timm.data import create_transform, resolve_model_data_config
from timm.models.vision_transformer import ATTN_LAYERS
from torch import nn

from visionattn.attention import attention_layer
from visionattn.blocks import block_layer
from visionattn.conversion import rebuild
from visionattn.errors import ConfigError, VisionAttnError, WeightsError, suggest

_log = logging.getLogger("visionattn")

_FORMAT = "visionattn-classifier"
_OURS = {"num_classes": "the classes are those of the data", "img_size": "the size is imgsz"}
_START = frozenset(("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"))
"""Options that say where weights to start from are, which a file that holds the weights does not need."""


@dataclass(frozen=True)
class Classifier:
    """A model and what is needed to build and feed it.

    Attributes:
        model: takes images (B, 3, H, W), returns logits (B, C).
        name: of the model in timm.
        kwargs: of ``timm.create_model``, besides ``num_classes``. ``attn_layer``, ``block_fn`` and ``mlp_layer`` are
            names, or ``{"name": ..., option: ...}``; timm's own names are known of the first alone.
        classes: names of the C classes, in order.
        data_config: of ``timm.data.create_transform``, which turns a PIL image into an input.
        attention_layers: of a model that :func:`visionattn.convert` returned, what was put where; empty for others.
    """

    model: nn.Module
    name: str
    kwargs: dict[str, Any]
    classes: list[str]
    data_config: dict[str, Any]
    attention_layers: dict[str, dict[str, Any]] = field(default_factory=dict)


class _Header(BaseModel):
    """What stands in the file beside the weights."""

    model_config = ConfigDict(extra="forbid")

    name: str
    kwargs: dict[str, Any]
    classes: list[str]
    data_config: dict[str, Any]
    attention_layers: dict[str, dict[str, Any]] = Field(default_factory=dict)


def build_classifier(name: str, classes: list[str], imgsz: int, options: dict[str, Any]) -> Classifier:
    """Build a classifier to train.

    Args:
        name: of a model in timm, or a ``.safetensors`` of ours to start from; if its classes are others than
            ``classes``, it gets a new head.
        classes: names of the classes.
        imgsz: side of the square input in pixels.
        options: further arguments of ``timm.create_model``; with ``.safetensors`` in place of the file's own, such as
            another ``attn_layer``. What weights the file lacks for them begins as it is made.

    Raises:
        ConfigError: the name or an option is unknown, or the model does not take such images.
        WeightsError: as :func:`load_classifier`.
    """
    if name.endswith(".safetensors"):
        classifier = _started(name, classes, imgsz, options)
    else:
        classifier = _created(name, classes, imgsz, options)
    try:
        with torch.inference_mode():
            shape = tuple(classifier.model.eval()(torch.zeros(1, 3, imgsz, imgsz)).shape)
    except Exception as error:  # a model refuses what it likes
        raise ConfigError(f"model {name} does not take images of {imgsz} x {imgsz} pixels: {error}") from error
    if shape != (1, len(classes)):
        raise ConfigError(f"model {name} returns {shape} for an image, expected (1, {len(classes)}); see timm.model")
    return classifier


def save_classifier(
    model: nn.Module,
    path: Path,
    *,
    name: str,
    kwargs: dict[str, Any],
    classes: list[str],
    data_config: dict[str, Any],
    attention_layers: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write weights and what is needed to build and feed the model; whole or not at all.

    Args:
        model: with the weights to keep.
        path: file to write, ``.safetensors``.
        name: as in :class:`Classifier`, like the others.
        kwargs: see there.
        classes: see there.
        data_config: see there.
        attention_layers: see there.
    """
    header = _Header(
        name=name,
        kwargs=kwargs,
        classes=classes,
        data_config=data_config,
        attention_layers=attention_layers or {},
    )
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_model(model, str(partial), {"format": _FORMAT, "classifier": header.model_dump_json()})
        partial.replace(path)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_classifier(
    path: str | Path, device: str = "cpu", options: dict[str, Any] | None = None, lacking: bool = False
) -> Classifier:
    """Build the classifier that a file describes and load its weights; no code in the file is run.

    Args:
        path: file written by :func:`save_classifier`.
        device: where to put the model, as torch names it.
        options: arguments of ``timm.create_model`` in place of the file's, such as ``dynamic_img_size``.
        lacking: whether the file may lack weights that the options ask for; a warning names them.

    Raises:
        WeightsError: the file is missing, damaged, not ours, or does not fit its own description.
    """
    path = Path(path)
    header = _read_header(path)
    try:
        kwargs = header.kwargs | (options or {})
        model = timm.create_model(header.name, num_classes=len(header.classes), **_parts(kwargs))
        if header.attention_layers:
            rebuild(model, header.attention_layers)
        missing, foreign = load_model(model, str(path), strict=not lacking)
        if foreign:
            raise ValueError(f"there is no place for {', '.join(sorted(foreign))}")
        create_transform(**header.data_config)
    except Exception as error:  # a model refuses what it likes
        raise WeightsError(
            f"{path}: the weights do not fit the model they describe, {header.name} with {len(header.classes)} classes"
            f"{f' and {options}' if options else ''} ({error}); give a file as training wrote it"
        ) from error
    if missing:
        _log.warning(
            "%s lacks %d weights, which begin as they are made: %s", path, len(missing), ", ".join(sorted(missing))
        )
    return Classifier(
        model.to(device).eval(), header.name, kwargs, header.classes, header.data_config, header.attention_layers
    )


def _read_header(path: Path) -> _Header:
    wanted = "give a .safetensors that training a classifier wrote, e.g. runs/classify/NAME/weights/best.safetensors"
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: got suffix {path.suffix!r}, expected .safetensors; {wanted}")
    if not path.is_file():
        raise WeightsError(f"weights not found: {path}; {wanted}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged or no safetensors file ({error}); {wanted}") from error
    if metadata.get("format") != _FORMAT:
        raise WeightsError(f"{path} is a safetensors file, but does not describe a classifier of ours; {wanted}")
    try:
        header = _Header.model_validate_json(metadata.get("classifier", ""))
    except ValidationError as error:
        raise WeightsError(f"{path}: its description of the model is damaged; {wanted}") from error
    if not timm.is_model(header.name) or _START & header.kwargs.keys():
        raise WeightsError(f"{path} asks for a model that this timm does not have or for other files; {wanted}")
    return header


def _started(path: str, classes: list[str], imgsz: int, options: dict[str, Any]) -> Classifier:
    _refuse(options, _OURS | dict.fromkeys(_START, "the weights to start from are those of the model"))
    found = load_classifier(path, options=options, lacking=bool(options))
    size = found.data_config["input_size"][-1]
    if size != imgsz:
        raise ConfigError(f"imgsz: got {imgsz}, but {path} was trained with {size}; set imgsz={size}")
    if found.classes != classes:
        model: Any = found.model
        model.reset_classifier(len(classes))
    return Classifier(found.model, found.name, found.kwargs, classes, found.data_config, found.attention_layers)


def _refuse(options: dict[str, Any], unfit: dict[str, str]) -> None:
    for key in unfit.keys() & options.keys():
        raise ConfigError(f"timm.model.{key} is not to be set: {unfit[key]}; remove it")


def _parts(options: dict[str, Any]) -> dict[str, Any]:
    """Put classes in the place of what a file can hold: a name, or ``{name: ..., option: ...}``."""
    found = dict(options)
    for key, find in (("attn_layer", attention_layer), ("block_fn", block_layer), ("mlp_layer", block_layer)):
        value = found.get(key)
        if isinstance(value, str) and value not in ATTN_LAYERS:
            found[key] = find(value)
        elif isinstance(value, dict):
            if "name" not in value:
                raise ConfigError(f"timm.model.{key}: got {value}; give a name beside the options, {{name: ..., ...}}")
            found[key] = find(value["name"], **{option: value[option] for option in value if option != "name"})
    return found


def create_model(name: str, options: dict[str, Any]) -> nn.Module:
    """Build a model of timm.

    Args:
        name: of the model.
        options: of ``timm.create_model``; ``attn_layer``, ``block_fn`` and ``mlp_layer`` as in :class:`Classifier`.

    Raises:
        ConfigError: the name or an option is unknown, or the model refuses them.
    """
    if not timm.is_model(name):
        known = timm.list_models()
        close = ", ".join(get_close_matches(name, known, n=3, cutoff=0.5)) or "none"
        raise ConfigError(
            f"model: unknown name {name!r}; nearest: {close}; accepted: one of the {len(known)} in timm.list_models() "
            "or the path of a .safetensors of ours"
        )
    attention = options.get("attn_layer", "attn")
    if isinstance(attention, str) and attention not in ATTN_LAYERS:
        raise ConfigError(f"timm.model.attn_layer: got {attention!r}; {suggest(attention, ATTN_LAYERS)}")
    try:
        model: nn.Module = timm.create_model(name, **_parts(options))
    except VisionAttnError:
        raise
    except Exception as error:  # a model refuses what it likes
        raise ConfigError(f"timm.model: {name} cannot be built with {options}: {error}") from error
    return model


def has_fixed_size(name: str) -> bool:
    """Whether a model of timm is made for one size of image; not, if timm does not know it."""
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError:
        return False
    return bool(published and published.fixed_input_size)


def _created(name: str, classes: list[str], imgsz: int, options: dict[str, Any]) -> Classifier:
    _refuse(options, _OURS)
    sized = {"img_size": imgsz} if has_fixed_size(name) else {}
    model = create_model(name, {"num_classes": len(classes)} | sized | options)
    kwargs = {key: value for key, value in (sized | options).items() if key not in _START}
    data_config = resolve_model_data_config(model, {"img_size": imgsz, "crop_pct": 1.0})
    return Classifier(model, name, kwargs, classes, data_config)
