"""A classifier's file as a model of timm."""

from typing import Any

from timm.models import register_model
from torch import nn


@register_model  # type: ignore[untyped-decorator]
def visionattn(pretrained: bool = False, file: str = "", **options: Any) -> nn.Module:
    """Load a file of ours: ``timm.create_model("visionattn", file="student.safetensors")``.

    Args:
        pretrained: without effect: the file has the weights.
        file: written by :func:`visionattn.backbones.classifier.save_classifier`.
        **options: arguments of ``timm.create_model`` in place of the file's, such as ``dynamic_img_size``.

    Raises:
        WeightsError: the file is none of ours, or damaged.
    """
    from visionattn.backbones.classifier import load_classifier  # reading files takes more imports than making models

    return load_classifier(file, options=options).model
