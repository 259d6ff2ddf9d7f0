"""The recipe of ELA: a new exact linear attention from the two feature maps of a kernel."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from visionattn.attention.layer import attention_layer
from visionattn.attention.linear import SignedAttention
from visionattn.errors import ConfigError
from visionattn.ops.criteria import KernelReport, Map, check_kernel
from visionattn.ops.precision import widen


class ExactKernelAttention(SignedAttention):
    """``phi(q).psi(k)``, normalised, for the maps that :func:`exact_kernel` gives; F features, O(N F).

    Features are computed in float32 at least, and not scaled: a map that overflows there does so here.
    """

    report: KernelReport | None = None

    def __init__(self, dim: int, num_heads: int = 8, *args: Any, phi: Map, psi: Map, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, *args, **kwargs)
        self.phi, self.psi = (deepcopy(x) if isinstance(x, nn.Module) else x for x in (phi, psi))

    def queries(self, q: Tensor) -> Tensor:
        return self.phi(widen(q))

    def keys(self, k: Tensor) -> Tensor:
        return self.psi(widen(k))

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.phi(q) @ self.psi(k).transpose(-2, -1)).log()


def exact_kernel(
    phi: Map,
    psi: Map,
    *,
    kernel: Callable[[Tensor, Tensor], Tensor] | None = None,
    meaning: str = "",
    dim: int = 16,
) -> type[ExactKernelAttention]:
    """Make a linear attention of the kernel ``k(q, k) = phi(q).psi(k)``, a class that timm takes as ``attn_layer``.

    docs/attention.md has an example.

    Args:
        phi: of queries, (..., D) to (..., F); a function, or a module, of which every layer gets a copy.
        psi: of keys, (..., D) to (..., F), likewise.
        kernel: the kernel of one pair, written independently, q, k of (..., D) to (...). With it, the four criteria of
            the paper are checked (:func:`~visionattn.ops.criteria.check_kernel`), and the report kept as ``report``.
        meaning: the geometric meaning; needed with ``kernel``.
        dim: width that the criteria are tried at, in float64.

    Raises:
        ConfigError: a criterion is not met.
    """
    report = None
    if kernel is not None:
        report = check_kernel(phi, psi, kernel, meaning, dim)
        if report.failures:
            raise ConfigError(f"exact_kernel: {'; '.join(report.failures)}; see docs/attention.md for the criteria")
    layer: Any = attention_layer(ExactKernelAttention, phi=phi, psi=psi)
    layer.report = report
    return layer
