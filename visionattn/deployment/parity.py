"""How far two outputs of a network are from each other, and how far they may be."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from visionattn.choices import Precision
from visionattn.deployment.info import ModelInfo
from visionattn.errors import ParityError

HALF_LIMIT = 65504.0
"""The largest number of float16."""

INT8_TOLERANCE = 0.15
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "int8": INT8_TOLERANCE}
"""Largest error that is accepted: of fp32 and fp16 the maximum relative one, of int8 the relative root mean square."""


NEAR: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.03, "int8": 0.3}
"""How far a box may be from its counterpart: in score, and in parts of its longer side."""

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
                f"{self.tolerance:g}. Export it in a higher precision, or report a bug"
            )


def errors_of(truth: list[Tensor], found: list[Tensor], info: ModelInfo) -> list[Error]:
    """Compare the outputs of a batch, part by part.

    Raises:
        ParityError: number or shapes of the outputs differ, or there are no boxes to compare.
    """
    if len(truth) != len(found):
        raise ParityError(f"got {len(found)} outputs from the file, {len(truth)} from the weights; export it anew")
    pairs = zip(_parts(truth, info), _parts([output.cpu() for output in found], info), strict=True)
    return [_error(part, expected, got, info.precision) for (part, expected), (_, got) in pairs]


def worst_rms(truth: list[Tensor], found: list[Tensor], info: ModelInfo) -> float:
    """Return the largest relative root mean square error of the parts of an output."""
    return float(np.max([error.rms for error in errors_of(truth, found, info)]))  # nan if one of them is


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


def _error(part: str, truth: Tensor, got: Tensor, precision: Precision) -> Error:
    if truth.shape != got.shape:
        raise ParityError(f"{part}: got {tuple(got.shape)} from the file, {tuple(truth.shape)} from the weights")
    if part == "detections":
        absolute, lost = _unmatched(truth, got, precision)
        return Error(part=part, absolute=absolute, relative=lost, rms=lost)
    truth, difference = truth.double(), (got.double() - truth.double())
    power = truth.square().mean().sqrt().clamp(min=1e-30)
    most, scale = float(difference.abs().max()), float(truth.abs().max().clamp(min=1e-30))
    if part == "scores":
        # Probabilities, whose scale is 1; that small ones are right shows in their logits. Where none counts, as
        # without training, they are held against themselves, but for what runtimes lose in a sigmoid.
        scale, most = (1.0, most) if scale >= LEAST_SCORE else (scale, max(most - 2e-7, 0.0))
    return Error(
        part=part,
        absolute=most,
        relative=most / scale,
        rms=float(difference.square().mean().sqrt() / power),
    )


def _unmatched(truth: Tensor, got: Tensor, precision: Precision) -> tuple[float, float]:
    """Return the largest difference of matched scores, and the share of the scores' sum that has no match.

    Boxes are matched one to one, so the file may neither lack any nor have more. A match is of the same class, differs
    in score by ``NEAR`` of the precision at most, and in no coordinate by more than that share of the box's longer side
    (of 32 pixels for smaller ones).
    """
    if not torch.isfinite(got).all():
        return float("nan"), float("nan")
    absolute, lost, total = 0.0, 0.0, 0.0
    for image, other in zip(truth.double(), got.double(), strict=True):
        rows, others = image[image[:, 4] >= LEAST_SCORE], other[other[:, 4] >= LEAST_SCORE]
        moved = (rows[:, None, :4] - others[None, :, :4]).abs().amax(-1)
        apart = (rows[:, None, 4] - others[None, :, 4]).abs()
        side = (rows[:, 2:4] - rows[:, :2]).amax(-1, keepdim=True).clamp(min=32)
        near = NEAR[precision]
        fits = (moved <= near * side) & (rows[:, None, 5] == others[None, :, 5]) & (apart <= near)
        first, second = linear_sum_assignment(torch.where(fits, apart, 2.0).numpy())
        good = fits[first, second]
        absolute = max(absolute, float(apart[first, second][good].max()) if good.any() else 0.0)
        both = float(rows[:, 4].sum() + others[:, 4].sum())
        matched = float(rows[first, 4][good].sum() + others[second, 4][good].sum())
        lost, total = lost + both - matched, total + both
    if not total:
        raise ParityError(
            "boxes cannot be compared: the weights find none on photographs; lower --conf (tools/predict.py has one "
            "of its own), or export raw predictions (--nms none)"
        )
    return absolute, lost / total
