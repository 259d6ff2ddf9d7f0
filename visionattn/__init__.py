"""Linear attention that is practical for vision.

Importing the package registers every attention of :data:`visionattn.attention.ATTENTION` with timm, so that
``timm.create_model("vit_tiny_patch16_224", attn_layer="ela_hadamard")`` works. Detectors live in
:mod:`visionattn.detection`, which imports Ultralytics.
"""

from visionattn import backbones
from visionattn.attention import ATTENTION, attention_layer, exact_kernel, explain, whiten
from visionattn.blocks import HyperLinkBlock, MoEMlp, PreNormBlock, balance_loss, block_layer
from visionattn.conversion import align, convert
from visionattn.ops.switch import kernels

__version__ = "0.1.0"
__all__ = [
    "ATTENTION",
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
    "exact_kernel",
    "explain",
    "kernels",
    "whiten",
]
