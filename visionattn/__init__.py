"""Linear attention that is practical for vision.

Importing the package registers every attention of :data:`visionattn.attention.ATTENTION` with timm, so that
``timm.create_model("vit_tiny_patch16_224", attn_layer="ela_hadamard")`` works. What needs Ultralytics is imported when
it is first asked for: ``load``, ``train``, ``evaluate``, ``export``, ``predict``, ``YOLOLAT``.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionattn.attention import ATTENTION, attention_layer, exact_kernel, explain, whiten
    from visionattn.blocks import HyperLinkBlock, MoEMlp, PreNormBlock, balance_loss, block_layer
    from visionattn.conversion import align, convert
    from visionattn.detection import YOLOLAT
    from visionattn.engine.evaluate import evaluate
    from visionattn.model import load
    from visionattn.ops.switch import kernels
    from visionattn.verbs import export, predict, train

__version__ = "0.1.0"
__all__ = [
    "ATTENTION",
    "YOLOLAT",
    "HyperLinkBlock",
    "MoEMlp",
    "PreNormBlock",
    "__version__",
    "align",
    "attention_layer",
    "backbones",
    "balance_loss",
    "block_layer",
    "convert",
    "evaluate",
    "exact_kernel",
    "explain",
    "export",
    "kernels",
    "load",
    "predict",
    "train",
    "whiten",
]

_HOMES = {
    "visionattn.attention": ("ATTENTION", "attention_layer", "exact_kernel", "explain", "whiten"),
    "visionattn.blocks": ("HyperLinkBlock", "MoEMlp", "PreNormBlock", "balance_loss", "block_layer"),
    "visionattn.conversion": ("align", "convert"),
    "visionattn.detection": ("YOLOLAT",),
    "visionattn.engine.evaluate": ("evaluate",),
    "visionattn.model": ("load",),
    "visionattn.ops.switch": ("kernels",),
    "visionattn.verbs": ("export", "predict", "train"),
}
"""Public names by the module that they are imported from when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name in ("backbones", "conversion"):
        return importlib.import_module(f"visionattn.{name}")
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(importlib.import_module(home), name)
            return globals()[name]
    raise AttributeError(f"module 'visionattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether this process is ``visionattn`` or ``python -m visionattn``, whose help must not wait for PyTorch."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    return program == "-m" or Path(program).stem == "visionattn"  # "-m" stands there while its package is imported


if not _is_command_line():
    from visionattn import backbones
