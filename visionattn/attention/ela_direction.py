"""ELA's kernel of direction and magnitude."""

from torch import Tensor

from visionattn.attention.linear import SignedAttention
from visionattn.ops import ela_direction, fused
from visionattn.ops.packing import Projection


class ElaDirectionAttention(SignedAttention):
    """``(a.b + 1)(|q|^2 + 1)(|k|^2 + 1)``, a and b the unit vectors of q and k (arXiv 2605.18848, section 3); O(N).

    Direction times magnitude, in D + 1 features; exact for its own kernel. The query's magnitude cancels in
    normalising.
    """

    def queries(self, q: Tensor) -> Tensor:
        return ela_direction.query_features(q)

    def keys(self, k: Tensor) -> Tensor:
        return ela_direction.key_features(k)

    def fuse(self, inputs: Projection, keep: Tensor | None) -> Tensor | None:
        return fused.attend_with_moments(inputs, "direction", keep)

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return ela_direction.log_kernel(q, k)
