"""ELA's summation kernel."""

from torch import Tensor

from visionattn.attention.linear import DistanceAttention
from visionattn.ops import distance


class ElaSumAttention(DistanceAttention):
    """``|q + k|^2 + 1e-6`` (arXiv 2605.18848, section 3), normalised: keys aligned with the query; O(N).

    D + 2 features; exact for its own kernel, and non-negative by construction. All keys share the weight ``|q|^2 +
    |k|^2``, so over many tokens the attention is close to uniform.
    """

    kind = "sum"

    def keys(self, k: Tensor) -> Tensor:
        return k

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return distance.log_kernel(q, k)
