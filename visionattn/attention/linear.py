"""Linear attention: what the three families of kernels in :mod:`visionattn.ops` share as modules."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.attention.base import Attention, key_mask, refuse_order
from visionattn.errors import UnsupportedError
from visionattn.ops import distance, fused, positive, scan, signed
from visionattn.ops.fused import FeatureMap
from visionattn.ops.packing import Projection
from visionattn.ops.scan import Family


class LinearAttention(Attention):
    """Attention that never forms the N x N matrix: O(N) over all tokens, causal in chunks, and stepwise with a state.

    Arguments are those of :class:`Attention`. A subclass is of one of the families below and gives :meth:`queries` and
    :meth:`keys`, what the family takes of them.

    Raises:
        UnsupportedError: ``attn_drop`` is not 0, or forward is given another mask than a padding mask.
    """

    packed = True
    """Whether kernels take the packed projection as it is."""

    def __init__(self, dim: int, num_heads: int = 8, *args: Any, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, *args, **kwargs)
        if self.attn_drop.p:
            raise UnsupportedError(
                f"{type(self).__name__}: attn_drop={self.attn_drop.p} drops entries of an N x N matrix that linear "
                "attention never forms; leave it at 0 and use proj_drop"
            )

    def queries(self, q: Tensor) -> Tensor:
        """Return what the family takes of queries (B, H, N, head_dim)."""
        raise NotImplementedError

    def keys(self, k: Tensor) -> Tensor:
        """Return what the family takes of keys (B, H, N, head_dim)."""
        raise NotImplementedError

    def family(self) -> Family:
        """Return the module of :mod:`visionattn.ops` that :meth:`queries` and :meth:`keys` are made for."""
        raise NotImplementedError

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        """Mix the values over all tokens, from what the family takes."""
        raise NotImplementedError

    def feature_size(self) -> int:
        """Return F, the number of features of a head: the state holds F x head_dim numbers and a few more."""
        device = next((x.device for x in chain(self.buffers(), self.parameters())), None)
        return self.keys(torch.zeros(1, self.num_heads, 1, self.head_dim, device=device)).shape[-1]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            mixed = self.fuse_parts(q, k, v, key_mask(attn_mask), is_causal)
            if mixed is not None:
                return mixed
        return self.run(self.queries(q), self.keys(k), v, key_mask(attn_mask), is_causal)

    @torch.jit.unused
    def attend_packed(self, x: Tensor, attn_mask: Tensor | None) -> Tensor | None:
        whole = self.packed and fused.reaches(x) and self.local is None
        if not whole or not isinstance(self.q_norm, nn.Identity) or not isinstance(self.k_norm, nn.Identity):
            return None
        return self.fuse(Projection(x, self.num_heads), key_mask(attn_mask))

    @torch.jit.unused
    def fuse_parts(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, is_causal: bool) -> Tensor | None:
        """Attend over all tokens or over those before each by a fused kernel, or return None."""
        if is_causal:
            return self.fuse_causal(q, k, v, keep)
        return self.fuse(Projection(q, self.num_heads, k, v), keep)

    @torch.jit.unused
    def fuse(self, inputs: Projection, keep: Tensor | None) -> Tensor | None:
        """Attend over all tokens by a fused kernel, or return None where the eager formula is to be taken.

        The output is as the inputs: (B, H, N, head_dim) of queries, keys and values, (B, N, dim) of packed ones.
        """
        return fused.refuse("there is none for this mechanism")

    @torch.jit.unused
    def fuse_causal(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor | None:
        """Attend to the tokens before each by a fused kernel, or return None where the eager formula is to be taken."""
        return fused.refuse("there is none for this mechanism with is_causal=True")

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, is_causal: bool) -> Tensor:
        """Mix the values over all tokens or over those before each, from what the family takes."""
        return self.causal(q, k, v, keep) if is_causal else self.mix(q, k, v, keep)

    @torch.jit.unused
    def causal(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        """Mix the values over the tokens before each, from what the family takes; not in TorchScript."""
        return scan.causal(self.family(), q, k, v, keep)

    def advance(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        return scan.step(self.family(), self.queries(q), self.keys(k), v, state)


class PositiveAttention(LinearAttention):
    """A kernel with positive features, given by :meth:`log_features`; see :mod:`visionattn.ops.positive`."""

    def log_features(self, x: Tensor) -> Tensor:
        """Return the logarithms of the features of queries or keys, (B, H, N, head_dim) to (B, H, N, F)."""
        raise NotImplementedError

    def queries(self, q: Tensor) -> Tensor:
        return self.log_features(q)

    def keys(self, k: Tensor) -> Tensor:
        return self.log_features(k)

    def family(self) -> Family:
        return positive

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        return positive.linear(q, k, v, keep)

    def fused_map(self) -> FeatureMap | None:
        """Return the map as fused kernels know it, or None."""
        return None

    def fuse(self, inputs: Projection, keep: Tensor | None) -> Tensor | None:
        return fused.attend_positive(inputs, self.fused_map(), keep)

    def fuse_causal(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor | None:
        features = self.fused_map()
        return fused.attend_causally(q, k, v, self.log_features if features is None else features, keep)


class WholeAttention(LinearAttention):
    """Positive features that are known when all tokens are, given by :meth:`features`: there is no causal form."""

    ordered = False
    packed = False

    def features(
        self, q: Tensor, k: Tensor, keep: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the features of queries and keys, both (B, H, N, head_dim) to (B, H, N, F)."""
        raise NotImplementedError

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        if is_causal:
            refuse_order()
        keep = key_mask(attn_mask)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self.fuse(Projection(q, self.num_heads, k, v), keep)
        a, b = self.features(q, k, keep, grid)
        return positive.linear(a, b, v, keep)


class SignedAttention(LinearAttention):
    """A kernel with features of any sign, :meth:`queries` and :meth:`keys`; see :mod:`visionattn.ops.signed`."""

    def family(self) -> Family:
        return signed

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        return signed.linear(q, k, v, keep)


class DistanceAttention(LinearAttention):
    """The kernel ``|q + k|^2`` of :meth:`queries` and :meth:`keys`; see :mod:`visionattn.ops.distance`."""

    kind: str
    """Name of the fused kernel."""

    def fuse(self, inputs: Projection, keep: Tensor | None) -> Tensor | None:
        return fused.attend_with_moments(inputs, self.kind, keep)

    def queries(self, q: Tensor) -> Tensor:
        return q

    def family(self) -> Family:
        return distance

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        return distance.linear(q, k, v, keep)

    def feature_size(self) -> int:
        return self.head_dim + 2
