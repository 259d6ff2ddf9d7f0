"""Spherical Yat attention."""

from torch import Tensor

from visionattn.attention.yat import YatAttention
from visionattn.ops import yat


class SphericalYatAttention(YatAttention):
    """``x^2 / (2 + epsilon - 2 x)`` of the cosine x of query and key, normalised (SLAY, arXiv 2602.04915, section 3).

    Exact, O(N^2 D): :class:`YatAttention` of unit vectors, and the kernel that ``slay`` approximates. Arguments are
    its.
    """

    def vectors(self, x: Tensor) -> Tensor:
        return yat.unit(x)
