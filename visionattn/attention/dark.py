"""DARKFormer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.attention.exponential import ExponentialFeatures
from visionattn.ops import dark, performer
from visionattn.ops.fused import FeatureMap, softmax_features


class DarkAttention(ExponentialFeatures):
    """``exp(q^T S k / sqrt(D))`` with a learned covariance ``S = M^T M`` a head (DARKFormer, arXiv 2603.04127); O(N F).

    Positive random features of M q and M k estimate it without bias; M starts as the identity, where this is Performer.
    The kernel changes with M: it is no estimate of softmax attention. Where the query and key projections are trained
    too, they can absorb M; it is of use where they are frozen or pretrained.

    The parameter is ``shift``, M - I, (heads, head_dim, head_dim), so that weight decay draws M to the identity.

    Args:
        **kwargs: as for :class:`~visionattn.attention.exponential.ExponentialFeatures` (``features``, ``draws``,
            ``seed``, ``calibrated``) and :class:`~visionattn.attention.Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        self.shift = nn.Parameter(torch.zeros(num_heads, self.head_dim, self.head_dim, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set M to the identity and draw the buffers anew."""
        super().reset_parameters()
        self.shift.zero_()

    def warp(self, x: Tensor) -> Tensor:
        """Return ``M x / D^(1/4)``, in float32 at least."""
        x = performer.scaled(x)
        return x + x @ self.shift.to(x.dtype).transpose(-2, -1)

    def fused_map(self) -> FeatureMap:
        return softmax_features(self.draws, self.shift, self.log_weights)

    def log_target(self, q: Tensor, k: Tensor) -> Tensor:
        m = torch.eye(self.head_dim, dtype=q.dtype, device=q.device) + self.shift.to(q.dtype)
        return dark.log_kernel(performer.scaled(q), performer.scaled(k), m)


@contextmanager
def whiten(model: nn.Module, loading: float = 1e-4) -> Iterator[None]:
    """Start every :class:`DarkAttention` of a model from data: M makes its queries and keys isotropic.

    This is for study. No start from data was found that trains to more than the identity, where every M begins: M^T M
    is then the inverse of the second moment, a kernel that weighs directions of noise as much as those that tell tokens
    apart, and that takes from trained queries and keys what they have learned.

    Run one forward pass within; each layer sets its M from what reaches it, and goes on with the new one::

        with whiten(model):
            model(images)

    Args:
        model: with the layers.
        loading: share of the mean eigenvalue of the second moment added to all of them.
    """

    @torch.no_grad()
    def fit(layer: DarkAttention, args: tuple[Any, ...]) -> None:
        q, k, _ = layer.project(args[0])
        m = dark.whitening(performer.scaled(torch.cat((q, k), -2)), loading)
        layer.shift.copy_(m - torch.eye(layer.head_dim, dtype=m.dtype, device=m.device))

    handles = [m.register_forward_pre_hook(fit) for m in model.modules() if isinstance(m, DarkAttention)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
