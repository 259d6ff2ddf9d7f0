"""Pretrained vision transformers, turned linear: swap, calibrate, align, report."""

from visionattn.conversion.align import Alignment, align
from visionattn.conversion.convert import convert
from visionattn.conversion.swap import rebuild

__all__ = ["Alignment", "align", "convert", "rebuild"]
