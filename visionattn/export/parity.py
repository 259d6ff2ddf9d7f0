"""How far two outputs of a network are from each other, and how far they may be."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from visionattn.errors import ParityError
from visionattn.export.info import ModelInfo, Precision

HALF_LIMIT = 65504.0
"""The largest number of float16."""

INT8_TOLERANCE = 0.15
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "int8": INT8_TOLERANCE}
"""Largest error that is accepted: of fp32 and fp16 the maximum relative one, of int8 the relative root mean square."""


LEAST_SCORE = 0.001
"""Boxes of a lower score do not count, neither here nor for AP."""


class Error(BaseModel):
    """How far a part of the output is from that of the weights in float32.

    Attributes:
        part: ``boxes``, ``scores``, ``score logits``, ``logits``, ``map0``, ...; ``detections`` where the file gives
            finished boxes.
        batch: images of the batch.
        size: (H, W) in pixels.
        absolute: largest difference; of detections, between matched scores.
        relative: the same over the largest magnitude of the part, which of scores is 1; of detections, the share of the
            scores' sum that has no counterpart of the same class, place and score.
        rms: root mean square of the difference over that of the part; of detections, as ``relative``.
    """

    model_config = ConfigDict(frozen=True)

    part: str
    batch: int = 0
    size: tuple[int, int] = (0, 0)
    absolute: float
    relative: float
    rms: float


@dataclass(frozen=True)
class Parity:
    """The errors of a file at the sizes tried, and what is accepted."""

    precision: Precision
    errors: list[Error]

    @property
    def tolerance(self) -> float:
        """The largest error that is accepted."""
        return TOLERANCE[self.precision]

    def measured(self, error: Error) -> float:
        """Return the figure of an error that is held against the tolerance."""
        return error.rms if self.precision == "int8" else error.relative

    @property
    def worst(self) -> Error:
        """The largest error."""
        return max(self.errors, key=lambda error: (not np.isfinite(self.measured(error)), self.measured(error)))

    def check(self, name: str) -> None:
        """Raise a ParityError unless all errors are within the tolerance."""
        worst = self.worst
        if not self.measured(worst) <= self.tolerance:  # nan is not
            kind = "relative root mean square" if self.precision == "int8" else "relative"
            raise ParityError(
                f"{name}: {worst.part} of a batch of {worst.batch} at {worst.size} differ from the weights by "
                f"{self.measured(worst):.2e} ({kind}), {worst.absolute:.2e} at most; accepted for {self.precision}: "
                f"{self.tolerance:g}. Nothing was written"
            )


def errors_of(truth: list[Tensor], found: list[Tensor], info: ModelInfo) -> list[Error]:
    """Compare the outputs of a batch, part by part.

    Raises:
        ParityError: the shapes differ.
    """
    pairs = zip(_parts(truth, info), _parts([output.cpu() for output in found], info), strict=True)
    return [_error(part, expected, got) for (part, expected), (_, got) in pairs]


def worst_rms(truth: list[Tensor], found: list[Tensor], info: ModelInfo) -> float:
    """Return the largest relative root mean square error of the parts of an output."""
    return max(error.rms for error in errors_of(truth, found, info))


def _parts(outputs: list[Tensor], info: ModelInfo) -> Iterator[tuple[str, Tensor]]:
    if info.task == "classify":
        yield "logits", outputs[0]
    elif info.task == "features":
        yield from ((f"map{index}", output) for index, output in enumerate(outputs))
    elif info.nms == "none":
        yield "boxes", outputs[0][:, :4]
        yield "scores", outputs[0][:, 4:]
        yield "score logits", outputs[0][:, 4:].double().clamp(LEAST_SCORE, 1 - LEAST_SCORE).logit()
    else:
        yield "detections", outputs[0]


def _error(part: str, truth: Tensor, got: Tensor) -> Error:
    if truth.shape != got.shape:
        raise ParityError(f"{part}: got {tuple(got.shape)} from the file, {tuple(truth.shape)} from the weights")
    if part == "detections":
        absolute, lost = _unmatched(truth, got)
        return Error(part=part, absolute=absolute, relative=lost, rms=lost)
    truth, difference = truth.double(), (got.double() - truth.double())
    power = truth.square().mean().sqrt().clamp(min=1e-30)
    # Scores are probabilities, whose scale is 1; that small ones are right shows in their logits.
    scale = torch.ones(()) if part == "scores" else truth.abs().max().clamp(min=1e-30)
    most = float(difference.abs().max())
    return Error(
        part=part,
        absolute=most,
        relative=most / float(scale),
        rms=float(difference.square().mean().sqrt() / power),
    )


def _unmatched(truth: Tensor, got: Tensor, near: float = 0.02) -> tuple[float, float]:
    """Return the largest difference of matched scores, and the share of the scores' sum that has no match.

    A match is of the same class, and differs in score by ``near`` and in sides by ``near`` of their largest at most.
    """
    if not torch.isfinite(got).all():
        return float("nan"), float("nan")
    absolute, lost, total = 0.0, 0.0, 0.0
    for rows, others in zip(truth.double(), got.double(), strict=True):
        rows = rows[rows[:, 4] >= LEAST_SCORE]
        if not len(rows):
            continue
        moved = (rows[:, None, :4] - others[None, :, :4]).abs().amax(-1)
        apart = (rows[:, None, 4] - others[None, :, 4]).abs()
        fits = (moved <= near * rows[:, :4].abs().max()) & (rows[:, None, 5] == others[None, :, 5]) & (apart <= near)
        matched = fits.any(1)
        nearest = torch.where(fits, apart, torch.inf).amin(1)
        absolute = max(absolute, float(nearest[matched].max()) if matched.any() else 0.0)
        lost, total = lost + float(rows[~matched, 4].sum()), total + float(rows[:, 4].sum())
    if not total:
        raise ParityError(
            f"boxes cannot be compared: none reaches a score of {LEAST_SCORE} on photographs, as if the weights were "
            "untrained; export raw predictions (--nms none)"
        )
    return absolute, lost / total
