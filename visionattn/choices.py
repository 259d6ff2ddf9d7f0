"""The words that options take, which the command line shows without importing what they choose from."""

from typing import Literal

Task = Literal["detect", "classify", "features"]
Precision = Literal["fp32", "fp16", "int8"]
Dynamic = Literal["batch", "size"]
NMS = Literal["none", "embedded", "free", "peaks"]
