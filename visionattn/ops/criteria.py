"""The four criteria that ELA sets for a kernel (arXiv 2605.18848, section 2), checked by trying."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
"""A feature map, (..., N, D) to (..., N, F)."""

_SCALES = (0.1, 1.0, 5.0)


@dataclass(frozen=True)
class KernelReport:
    """What was found of a kernel.

    Attributes:
        decomposition_error: largest difference of ``phi(q).psi(k)`` from the kernel, over its largest value; criterion
            1 asks for 1e-9.
        minimum: smallest value found, by draws and by descent from them, over the largest; criterion 3 asks for -1e-9.
        contrast: standard deviation over mean of the weights that a query of unit variance gives to keys; criterion 2
            asks for 0.05. Uniform attention has 0.
        finite_gradients: whether all gradients are finite, at the same points.
        meaning: the geometric meaning stated; criterion 4 asks for some.
    """

    decomposition_error: float
    minimum: float
    contrast: float
    finite_gradients: bool
    meaning: str

    @property
    def failures(self) -> list[str]:
        """What is not fulfilled, in words; empty if all is."""
        found = {
            f"phi.psi differs from the kernel by {self.decomposition_error:.2g} of its range": (
                not self.decomposition_error <= 1e-9
            ),
            f"not discriminative: weights vary by {self.contrast:.2g} of their mean": not self.contrast > 0.05,
            "gradients are not finite": not self.finite_gradients,
            f"negative: found {self.minimum:.2g} of its range": not self.minimum >= -1e-9,
            "no geometric meaning is stated": not self.meaning.strip(),
        }
        return [text for text, failed in found.items() if failed]


def check_kernel(
    phi: Map, psi: Map, kernel: Callable[[Tensor, Tensor], Tensor], meaning: str, dim: int = 16
) -> KernelReport:
    """Check a kernel that is meant to be ``phi(q).psi(k)`` against the four criteria, in float64.

    Trying proves no kernel right; a kernel that fails is wrong.

    Args:
        phi: of queries, (N, dim) to (N, F).
        psi: of keys, (N, dim) to (N, F).
        kernel: of one pair, written independently: q, k of (..., dim) to (...).
        meaning: in the space of queries and keys: when is the kernel large?
        dim: width of the queries and keys to try.
    """
    generator = torch.Generator().manual_seed(0)
    errors, minima, finite = [], [], True
    for scale in _SCALES:
        q, k = (scale * torch.randn(64, dim, generator=generator, dtype=torch.float64) for _ in range(2))
        q, k = q.requires_grad_(), k.requires_grad_()
        product = phi(q) @ psi(k).T
        pairs = kernel(q.unsqueeze(1), k.unsqueeze(0)).expand_as(product)
        size = pairs.detach().abs().max()
        errors.append(float((product - pairs).detach().abs().max() / size))
        if product.requires_grad:
            gradients = torch.autograd.grad(product.sum(), (q, k), allow_unused=True)
            finite &= all(g is None or bool(g.isfinite().all()) for g in gradients)
        minima.append(float(_lowest(kernel, q.detach(), k.detach()) / size))
        if scale == 1:
            weights = pairs.detach()
            contrast = float((weights.std(1) / weights.mean(1)).mean())
    return KernelReport(_worst(errors, max), _worst(minima, min), contrast, finite, meaning)


def _worst(found: list[float], of: Callable[[list[float]], float]) -> float:
    """Return the worst number; one that is not a number is worse than any."""
    return next((x for x in found if x != x), of(found))


def _lowest(kernel: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor, steps: int = 100) -> Tensor:
    """Descend from pairs to where the kernel is smallest."""
    pair = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    optimizer = torch.optim.Adam(pair, lr=0.05 * float(q.std()))
    lowest = kernel(q, k).min()
    for _ in range(steps):
        values = kernel(*pair)
        lowest = torch.minimum(lowest, values.detach().min())
        if not values.requires_grad:
            break
        optimizer.zero_grad()
        torch.autograd.backward(values.sum())
        optimizer.step()
    return lowest
