"""Honest controls of small detectors: Ultralytics' own, made as narrow."""

from typing import Any

from ultralytics.nn.tasks import yaml_model_load

from visionattn.errors import ConfigError


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
    if not width > 0:
        raise ConfigError(f"control {control!r}: expected a width above 0")
    shared = {key: value for key, value in content.items() if key not in ("scale", "yaml_file")}
    return f"{family}n-width{width:g}", shared | {"scales": {"n": [depth, width, most]}, "reg_max": 1}
