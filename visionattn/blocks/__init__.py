"""Transformer blocks: residual layouts around an attention and an MLP, with the constructor of timm's block."""

from visionattn.blocks.hyperlink import HyperLinkBlock, MemoryLobe
from visionattn.blocks.moe import MoEMlp, balance_loss
from visionattn.blocks.prenorm import PreNormBlock

__all__ = ["HyperLinkBlock", "MemoryLobe", "MoEMlp", "PreNormBlock", "balance_loss"]
