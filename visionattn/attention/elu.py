"""ELU+1 linear attention."""

from torch import Tensor

from visionattn.attention.base import LinearAttention
from visionattn.ops import elu


class EluAttention(LinearAttention):
    """``phi(q).phi(k)`` with ``phi(x) = elu(x) + 1`` (arXiv 2006.16236, equation 7); O(N), exact for its own kernel."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return elu.linear(q, k, v)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return elu.reference(q, k, v)
