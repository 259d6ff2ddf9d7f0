"""Whether a file computes what the weights compute: the two are run on the same photographs and compared."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from sklearn.datasets import load_sample_images
from torch import Tensor

from visionattn.errors import ParityError
from visionattn.export.info import ModelInfo, Precision
from visionattn.export.inputs import prepare
from visionattn.export.network import Network
from visionattn.export.session import Session

TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.15}
"""Largest error that is accepted: of fp32 and fp16 the maximum relative one, of int8 the relative root mean square."""


LEAST_SCORE = 0.001
"""Boxes of a lower score do not count, neither here nor for AP."""


class Error(BaseModel):
    """How far a part of the output is from that of the weights in float32.

    Attributes:
        part: ``boxes``, ``scores``, ``score logits``, ``logits``, ``map0``, ...; ``detections`` where the file gives finished
            boxes.
        batch: images of the batch.
        size: (H, W) in pixels.
        absolute: largest difference; of detections, between matched scores.
        relative: the same over the largest magnitude of the part, which of scores is 1; of detections, the share of the
            scores' sum that has no counterpart of the same class, place and score.
        rms: root mean square of the difference over that of the part; of detections, as ``relative``.
    """

    model_config = ConfigDict(frozen=True)

    part: str
    batch: int
    size: tuple[int, int]
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
                f"{name}: {worst.part} of a batch of {worst.batch} at {worst.size} differ from the weights by {self.measured(worst):.2e} "
                f"({kind}), {worst.absolute:.2e} at most; accepted for {self.precision}: {self.tolerance:.0e}. Nothing was written"
            )


def compare(network: Network, session: Session, trials: Sequence[tuple[int, tuple[int, int]]] | None = None) -> Parity:
    """Run weights and file on photographs at several sizes.

    Args:
        network: the weights, in float32.
        session: the file in its runtime.
        trials: batches and sizes (H, W); None for those of :func:`trials_of`.

    Raises:
        ParityError: the file does not run at a size that it should take.
    """
    errors = []
    for batch, size in trials or trials_of(session.info):
        images = photographs(batch, size, session.info)
        try:
            found = session(images)
        except Exception as error:  # a runtime refuses what it likes
            raise ParityError(
                f"{session.info.model}: the file does not take a batch of {batch} at {size}: {error}"
            ) from error
        with torch.inference_mode():
            outputs = network.truth(images)
        expected = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        pairs = zip(_parts(expected, session.info), _parts([x.cpu() for x in found], session.info), strict=True)
        for (part, truth), (_, got) in pairs:
            errors.append(_error(part, batch, size, truth, got))
    return Parity(session.info.precision, errors)


def trials_of(info: ModelInfo) -> list[tuple[int, tuple[int, int]]]:
    """Return the batches and sizes to try: all combinations of those that the file takes."""
    (H, W), stride = info.size, info.stride
    batches = [1, 3] if "batch" in info.dynamic else [info.batch]
    wide, small = (H, W + 2 * stride), (max(H // 2 // stride, 2) * stride, max(W // 2 // stride, 2) * stride)
    sizes = [info.size, wide, small] if "size" in info.dynamic else [info.size]
    return list(itertools.product(batches, sizes))


def photographs(count: int, size: tuple[int, int], info: ModelInfo) -> Tensor:
    """Return pieces of two photographs that scikit-learn brings, as the network takes them: (count, 3, H, W)."""
    return prepare([_piece(index, size) for index in range(count)], info, size)


@cache
def _photos() -> list[NDArray[np.uint8]]:
    return list(load_sample_images().images)


def _piece(index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Cut one of many pieces, of the proportions asked for, and bring it to the size."""
    photo = _photos()[index % 2]
    rng = np.random.default_rng(index)
    height, width = photo.shape[:2]
    scale = min(height / size[0], width / size[1]) * rng.uniform(0.6, 1)
    h, w = max(int(size[0] * scale), 1), max(int(size[1] * scale), 1)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    piece = cv2.resize(photo[top : top + h, left : left + w], size[::-1], interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(piece[:, ::-1] if index % 3 == 1 else piece, dtype=np.uint8)


def _parts(outputs: list[Tensor], info: ModelInfo) -> Iterator[tuple[str, Tensor]]:
    if info.task == "classify":
        yield "logits", outputs[0]
    elif info.task == "features":
        yield from ((f"map{index}", output) for index, output in enumerate(outputs))
    elif info.nms == "none":
        yield "boxes", outputs[0][:, :4]
        yield "scores", outputs[0][:, 4:]
        yield "score logits", outputs[0][:, 4:].double().clamp(LEAST_SCORE / 10, 1 - LEAST_SCORE).logit()
    else:
        yield "detections", outputs[0]


def _error(part: str, batch: int, size: tuple[int, int], truth: Tensor, got: Tensor) -> Error:
    if truth.shape != got.shape:
        raise ParityError(f"{part}: got {tuple(got.shape)} from the file, {tuple(truth.shape)} from the weights")
    if part == "detections":
        absolute, lost = _unmatched(truth, got)
        return Error(part=part, batch=batch, size=size, absolute=absolute, relative=lost, rms=lost)
    truth, difference = truth.double(), (got.double() - truth.double())
    power = truth.square().mean().sqrt().clamp(min=1e-30)
    # Scores are probabilities, whose scale is 1; that small ones are right shows in their logits.
    scale = torch.ones(()) if part == "scores" else truth.abs().max().clamp(min=1e-30)
    most = float(difference.abs().max())
    return Error(
        part=part,
        batch=batch,
        size=size,
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
            f"boxes cannot be compared: none reaches a score of {LEAST_SCORE} on photographs, as if the weights were untrained; "
            "export raw predictions (--nms none)"
        )
    return absolute, lost / total


def half_range(onnx_file: Path, images: Tensor) -> tuple[str, float]:
    """Return the float16 value of a graph that reaches the largest magnitude on some images, and that magnitude.

    ONNX Runtime computes float16 in float32 on CPUs and rounds only what leaves the graph, so that an overflow inside
    would not be seen. Here every float16 value leaves the graph.

    Args:
        onnx_file: graph of float16.
        images: its input, (B, 3, H, W).
    """
    import onnx
    import onnxruntime

    model = onnx.shape_inference.infer_shapes(onnx.load(str(onnx_file)))
    kept = {output.name for output in model.graph.output}
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 and value.name not in kept:
            model.graph.output.append(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT16, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs() if output.type == "tensor(float16)"]
    values = session.run(names, {session.get_inputs()[0].name: images.numpy()})
    peaks = {name: float(np.abs(value).max(initial=0)) for name, value in zip(names, values, strict=True)}
    worst = max(peaks, key=lambda name: (not np.isfinite(peaks[name]), peaks[name]))
    return worst, peaks[worst]
