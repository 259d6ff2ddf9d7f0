"""Yat attention."""

from typing import Any

from torch import Tensor

from visionattn.attention.base import Attention, key_mask
from visionattn.errors import ConfigError, UnsupportedError
from visionattn.ops import yat
from visionattn.ops.cache import Cache, extended


class YatAttention(Attention):
    """``(q.k)^2 / (|q - k|^2 + epsilon)``, normalised (SLAY, arXiv 2602.04915, section 3); exact, O(N^2 D).

    Normalised by its sum: the authors' code for the quadratic form passes the kernel through a softmax instead, which
    is another mechanism. Not linear: see ``slay`` for features of the spherical one.

    Args:
        epsilon: of the kernel; a query and an equal key have ``|q|^4 / epsilon``.
        **kwargs: as for :class:`~visionattn.attention.Attention`.

    Raises:
        ConfigError: ``epsilon`` is not positive.
        UnsupportedError: ``attn_drop`` is not 0.
    """

    def __init__(self, dim: int, num_heads: int = 8, *args: Any, epsilon: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, *args, **kwargs)
        if epsilon <= 0:
            raise ConfigError(f"epsilon={epsilon}; give a positive number")
        if self.attn_drop.p:
            raise UnsupportedError(f"{type(self).__name__} does not drop attention weights; leave attn_drop at 0")
        self.epsilon = epsilon

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        return yat.attend(self.vectors(q), self.vectors(k), v, self.epsilon, key_mask(attn_mask), is_causal)

    def vectors(self, x: Tensor) -> Tensor:
        """Return the vectors that the kernel is taken of."""
        return x

    def advance(self, q: Tensor, k: Tensor, v: Tensor, state: Cache | None) -> tuple[Tensor, Cache]:
        state = extended(state, self.vectors(k), v)
        return yat.attend(self.vectors(q), state.k, state.v, self.epsilon), state

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return yat.log_kernel(self.vectors(q), self.vectors(k), self.epsilon)
