"""ELA's subtraction kernel."""

from torch import Tensor

from visionattn.attention.linear import DistanceAttention
from visionattn.ops import distance


class ElaDiffAttention(DistanceAttention):
    """``|q - k|^2 + 1e-6`` (arXiv 2605.18848, section 3), normalised: keys opposed to the query; D + 2 features, O(N).

    Exact for its own kernel, and non-negative by construction. The nearer a key, the less it weighs: a token that is
    its own query and key gets no weight from itself. As for the sum, attention over many tokens is close to uniform.
    """

    kind = "diff"

    def keys(self, k: Tensor) -> Tensor:
        return -k

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return distance.log_kernel(q, -k)
