"""Whether an attention operation is right: what has to hold before it is timed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visionattn.ops import switch
from visionattn.profiling.clock import peak_memory
from visionattn.profiling.entrants import Direction, Entrant, apart
from visionattn.profiling.protocols import deviation
from visionattn.profiling.steps import reason_of

Sets = Mapping[int, Sequence[tuple[Tensor, Tensor]]]
"""For each number of streams, sets of a packed projection (B, N, streams x dim) and a gradient of the output."""

AGREES, WORSE = 0.1, 1.5
"""Largest relative L2 error to float64, and how many times the error of the eager form."""


@dataclass(frozen=True)
class Verdict:
    """Of an entrant.

    Attributes:
        error: relative L2 error to float64 of the output, or of the gradient where there is one.
        ratio: the error over that of the eager form; the larger one of output and gradient.
        bitwise: whether a second call gave the same bits.
        peak: bytes at most above the inputs; None on the CPU.
        reason: why it is not to be timed; None if it may.
    """

    error: float | None = None
    ratio: float | None = None
    bitwise: bool | None = None
    peak: int | None = None
    reason: str | None = None


class Judge:
    """Compares entrants with float64 and with eager code, on the first set of inputs.

    Entrants of a mechanism should come one after the other: what they are compared with is kept until the next one.

    Args:
        direction: forward or training.
        sets: inputs.
    """

    def __init__(self, direction: Direction, sets: Sets) -> None:
        self.direction, self.sets = direction, sets
        self._mechanism = ""
        self._truth: tuple[Tensor, ...] = ()
        self._eager: list[float] | None = None

    def __call__(self, entrant: Entrant) -> Verdict:
        """Return the verdict; what an entrant raises is the reason in it."""
        try:
            return self._judge(entrant)
        except Exception as error:  # whatever a backend, a compiler or a driver makes of what it cannot do
            return Verdict(reason=reason_of(error))

    def _judge(self, entrant: Entrant) -> Verdict:
        self._prepare(entrant)
        x, g = self.sets[entrant.layer.streams][0]
        with entrant.within():
            found = entrant.run(self.direction, x, g)
            again = entrant.run(self.direction, x, g)
            peak = peak_memory(lambda: entrant.run(self.direction, x, g), x.device)
        bitwise = all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
        errors = self._errors(entrant, found)
        ratio = None if self._eager is None else max(map(_over, errors, self._eager))
        verdict = Verdict(errors[-1], ratio, bitwise, peak)
        return replace(verdict, reason=_fault(entrant, found, max(errors), verdict))

    def _prepare(self, entrant: Entrant) -> None:
        """Compute what the entrants of a mechanism are compared with, for the first of them."""
        if entrant.mechanism == self._mechanism:
            return
        x, g = self.sets[entrant.layer.streams][0]
        self._mechanism, self._eager = "", None
        self._truth = entrant.truth(self.direction, x, g)
        if entrant.mechanism != "softmax":
            with switch.kernels("eager"):
                eager = replace(entrant, call=entrant.layer).run(self.direction, x, g)
            self._eager = self._errors(entrant, eager)
        self._mechanism = entrant.mechanism

    def _errors(self, entrant: Entrant, found: Sequence[Tensor]) -> list[float]:
        """Return the relative L2 errors of an output (B, N, dim) and a gradient (B, N, streams x dim)."""
        out, *grads = found
        parts = [out, *(apart(grad, entrant.layer.streams) for grad in grads)]
        pairs = zip(parts, self._truth, strict=True)
        return [deviation(part[tuple(map(slice, truth.shape))], truth)[0] for part, truth in pairs]


def _over(error: float, eager: float) -> float:
    return error / eager if eager else (math.inf if error else 1.0)


def _fault(entrant: Entrant, found: Sequence[Tensor], error: float, verdict: Verdict) -> str | None:
    """Return what forbids to time an entrant, or None."""
    if not all(bool(part.isfinite().all()) for part in found):
        return "not finite"
    if not error <= AGREES:
        return f"relative error {error:.1e} to float64"
    if verdict.ratio is not None and not verdict.ratio <= WORSE:
        return f"error {verdict.ratio:.2f} times that of the eager form"
    if entrant.form == "fused" and not verdict.bitwise:
        return "a second call gives other bits"
    return None
