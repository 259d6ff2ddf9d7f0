"""Honest controls: Ultralytics' detectors made as narrow, and ours with something else in place of their attention."""

import inspect
import math
from typing import Any

from ultralytics.nn.tasks import yaml_model_load

from visionattn.attention import ATTENTION
from visionattn.detection.blocks import LAT
from visionattn.detection.model import resolve_model
from visionattn.errors import ConfigError, suggest

NOTHING, CONVOLUTION, LOCAL = "none", "conv", "local"


def narrow_control(control: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the yaml of a model of Ultralytics' made narrower or wider.

    Args:
        control: its family and the width, as ``yolo26:0.09``; depth and the rest are those of the family's n, but for a
            box side that is one number (``reg_max: 1``), as in our models.

    Raises:
        ConfigError: there is no such family, or the width is no positive number.
    """
    family, _, text = control.partition(":")
    try:
        width = float(text)
        content: dict[str, Any] = yaml_model_load(f"{family}n.yaml")
        depth, _, most = content["scales"]["n"]
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ConfigError(f"control {control!r}; expected a family of Ultralytics and a width: yolo26:0.09") from error
    if not 0 < width < math.inf:
        raise ConfigError(f"control {control!r}: expected a width above 0")
    shared = {key: value for key, value in content.items() if key not in ("scale", "yaml_file")}
    return f"{family}n-width{width:g}", shared | {"scales": {"n": [depth, width, most]}, "reg_max": 1}


def ablated(ablation: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the yaml of a model with something else in all its ``LAT`` rows.

    Args:
        ablation: a model and what to put there, as ``yolo-lat-p:softmax``: another attention by name; ``none``, which
            takes the row away; ``conv``, a residual pair of 3x3 convolutions with as many weights; ``local``, the block
            without attention: its depthwise convolution between the projections, with fewer weights.

    Raises:
        ConfigError: there is no such model, it has no such row or, for ``local``, one without a depthwise convolution,
            or the replacement is unknown.
    """
    model, _, replacement = ablation.rpartition(":")
    known = (NOTHING, CONVOLUTION, LOCAL, *ATTENTION)
    if not model or replacement not in known:
        raise ConfigError(f"ablation {ablation!r}; expected MODEL:ATTENTION; {suggest(replacement, known)}")
    content: dict[str, Any] = yaml_model_load(resolve_model(model))
    rows = [row for row in (*content["backbone"], *content["head"]) if row[2] == "LAT"]
    if not rows:
        raise ConfigError(f"ablation {ablation!r}: {model} has no LAT row to change")
    for row in rows:
        _replace(row, replacement)
    stem = model.rpartition("/")[2].removesuffix(".yaml")
    return f"{stem}-{replacement}", {key: value for key, value in content.items() if key not in ("scale", "yaml_file")}


def _replace(row: list[Any], replacement: str) -> None:
    """Change a ``LAT`` row in place."""
    given = inspect.signature(LAT).bind(*row[3])
    given.apply_defaults()
    options = given.arguments
    if replacement == NOTHING:
        row[2:] = ["nn.Identity", []]
    elif replacement == CONVOLUTION:
        c, side = options["c"], options["kernel_size"]
        hidden = round(((4 + 2 * options["mlp_ratio"]) * c + side * side) / 18)
        row[2:] = ["Bottleneck", [c, True, 1, [3, 3], (hidden + 0.5) / c]]  # it rounds down
    elif replacement == LOCAL and not options["kernel_size"]:
        raise ConfigError("ablation local: a LAT row has no depthwise convolution; give another ablation, as none")
    else:
        row[3] = [*(options | {"attention": None if replacement == LOCAL else replacement}).values()]
