"""Honest controls of small detectors: Ultralytics' own, made as narrow."""

from pathlib import Path
from typing import Any

import yaml
from ultralytics.nn.tasks import yaml_model_load

from visionattn.data.files import write_text
from visionattn.errors import ConfigError


def narrow_control(control: str, folder: Path) -> str:
    """Write a model of Ultralytics' made narrower or wider, the honest control of a small one.

    Args:
        control: its family and the width, as ``yolo26:0.09``; depth and the rest are those of the family's n,
            but for a box side that is one number (``reg_max: 1``), as in our models.
        folder: takes the yaml, named after both.

    Returns:
        Path of the yaml.

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
    content = {key: value for key, value in content.items() if key not in ("scale", "yaml_file")}
    content |= {"scales": {"n": [depth, width, most]}, "reg_max": 1}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{family}n-width{width:g}.yaml"
    write_text(path, yaml.safe_dump(content, sort_keys=False))
    return str(path)
