"""The recipe of ELA: a new exact linear attention from the two feature maps of a kernel."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from visionattn.attention.linear import SignedAttention
from visionattn.errors import ConfigError
from visionattn.ops.criteria import KernelReport, Map, check_kernel
from visionattn.ops.precision import widen


class ExactKernelAttention(SignedAttention):
    """``phi(q).psi(k)``, normalised, for the maps that :func:`exact_kernel` gives; F features, O(N F).

    Features are computed in float32 at least, and not scaled: a map that overflows there does so here.
    """

    phi: Map
    psi: Map
    report: KernelReport | None = None

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
) -> type[ExactKernelAttention]:
    """Make a linear attention of the kernel ``k(q, k) = phi(q).psi(k)``, a class that timm takes as ``attn_layer``.

    ::

        def quadratic(x):  # (1 + |x|^2)-weighted direction ...
            return torch.cat((x.square(), torch.ones_like(x[..., :1])), -1)

        layer = exact_kernel(quadratic, quadratic, kernel=lambda q, k: (q.square() * k.square()).sum(-1) + 1,
                             meaning="large where the same entries are large, whatever their sign")
        timm.create_model("vit_tiny_patch16_224", attn_layer=layer)

    Args:
        phi: of queries, (..., D) to (..., F).
        psi: of keys, (..., D) to (..., F).
        kernel: the kernel of one pair, written independently, q, k of (..., D) to (...). With it, the four criteria of
            the paper are checked (:func:`~visionattn.ops.criteria.check_kernel`), and the report kept as ``report``.
        meaning: the geometric meaning; needed with ``kernel``.

    Raises:
        ConfigError: a criterion is not met.
    """
    report = None
    if kernel is not None:
        report = check_kernel(phi, psi, kernel, meaning)
        if report.failures:
            raise ConfigError(f"exact_kernel: {'; '.join(report.failures)}; see docs/attention.md for the criteria")
    body: dict[str, Any] = {
        "phi": staticmethod(phi),
        "psi": staticmethod(psi),
        "report": report,
        "__module__": __name__,
        "__doc__": meaning or ExactKernelAttention.__doc__,
    }
    return type("ExactKernelAttention", (ExactKernelAttention,), body)
