"""Pretrained vision transformers, turned linear: swap, calibrate, align, report."""

from visionattn.conversion.align import Alignment, align
from visionattn.conversion.convert import convert
from visionattn.conversion.keep import sensitivity
from visionattn.conversion.refit import refit
from visionattn.conversion.report import BlockReport, ConversionReport, Speed, report
from visionattn.conversion.swap import rebuild

__all__ = [
    "Alignment",
    "BlockReport",
    "ConversionReport",
    "Speed",
    "align",
    "convert",
    "rebuild",
    "refit",
    "report",
    "sensitivity",
]
