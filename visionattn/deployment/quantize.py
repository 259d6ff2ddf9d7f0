"""Post-training quantisation to int8 by a few images, with sensitive parts kept in float32 by measurement.

ONNX graphs are quantised by ONNX Runtime, OpenVINO's by NNCF. Both are judged alike: by the error of the output on
images that were not calibrated by.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionattn.data import load_image
from visionattn.deployment.info import ModelInfo
from visionattn.deployment.inputs import prepare
from visionattn.deployment.parity import INT8_TOLERANCE, worst_rms
from visionattn.errors import ConfigError, UnsupportedError

_log = logging.getLogger("visionattn")

LEAST_IMAGES = 8

HEAVY = ("Conv", "MatMul", "Gemm")
"""Operations of ONNX that are quantised."""

PRODUCTS = ("Convolution", "GroupConvolution", "MatMul")
"""Those of OpenVINO; what lies between them is quantised along with them."""


@dataclass(frozen=True)
class Calibration:
    """Images to quantise by: three quarters set the ranges, the rest judges.

    Attributes:
        images: paths, at least 8.
        tolerance: relative root mean square error of the output, up to which parts are put back into float32.

    Raises:
        ConfigError: there are fewer.
    """

    images: tuple[Path, ...]
    tolerance: float = INT8_TOLERANCE

    def __post_init__(self) -> None:
        if len(self.images) < LEAST_IMAGES:
            raise ConfigError(
                f"calibration: got {len(self.images)} images, expected {LEAST_IMAGES} or more, better 100"
            )

    @property
    def judges(self) -> tuple[Path, ...]:
        """Images that no range was set by."""
        return self.images[-(len(self.images) // 4) :]

    def inputs(self, info: ModelInfo, limit: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Yield batches to set ranges by."""
        images = self.images[: len(self.images) - len(self.judges)][:limit]
        for first in range(0, len(images), info.batch):
            part = images[first : first + info.batch]
            yield batch_of(part + images[: info.batch - len(part)], info, info.size).numpy()

    def sample(self, info: ModelInfo) -> Tensor:
        """Return a batch to judge the error of quantising by."""
        return self.judging(info, max(info.batch, min(len(self.judges), 16)), info.size)

    def judging(self, info: ModelInfo, batch: int, size: tuple[int, int]) -> Tensor:
        """Return a batch to judge by."""
        judges = self.judges
        return batch_of([judges[index % len(judges)] for index in range(batch)], info, size)


def batch_of(images: Sequence[Path], info: ModelInfo, size: tuple[int, int]) -> Tensor:
    """Read images as one batch of a network's input."""
    return prepare([load_image(image) for image in images], info, size)


def quantize_onnx(path: Path, target: Path, calibration: Calibration, info: ModelInfo, symmetric: bool) -> list[str]:
    """Quantise convolutions and matrix products of an ONNX file; return the nodes that stayed in float32.

    If the error of the whole is too large, each node is quantised alone, and those of the largest error stay in
    float32, twice as many at every try.

    Args:
        path: graph of float32.
        target: where the graph of int8 goes.
        calibration: images.
        info: of the network.
        symmetric: ranges around zero and signed, as TensorRT wants them; else those of unsigned numbers with an offset,
            which are more exact.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = path.with_suffix(".ready.onnx")
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    judge = _OnnxJudge(ready, calibration, info, symmetric)
    error = judge.error(target, [])
    kept: list[str] = []
    ranked: list[str] = []
    while not error <= calibration.tolerance and len(kept) < len(judge.nodes):
        ranked = ranked or judge.ranked()
        kept = ranked[: max(2 * len(kept), 1)]
        error = judge.error(target, kept)
        _log.info("int8: error %.3f with %d of %d nodes in float32", error, len(kept), len(judge.nodes))
    return kept


class _OnnxJudge:
    """Quantises parts of a graph and tells the error."""

    def __init__(self, path: Path, calibration: Calibration, info: ModelInfo, symmetric: bool) -> None:
        import onnx

        self._path, self._info, self._symmetric = path, info, symmetric
        nodes = onnx.load(str(path)).graph.node
        self.nodes = [node.name for node in nodes if node.op_type in HEAVY]
        self._inputs = list(calibration.inputs(info))
        self._batch = calibration.sample(info)
        self._truth = self._run(path)

    def error(self, target: Path, kept: list[str]) -> float:
        """Quantise all nodes but some, by all images."""
        return self._quantized(target, [node for node in self.nodes if node not in kept], self._inputs)

    def ranked(self) -> list[str]:
        """Return the nodes by the error that each alone makes, the largest first."""
        trial = self._path.with_suffix(".trial.onnx")
        errors = {node: self._quantized(trial, [node], self._inputs[:8]) for node in self.nodes}
        return sorted(errors, key=lambda node: -errors[node])

    def _quantized(self, target: Path, nodes: list[str], inputs: list[NDArray[np.float32]]) -> float:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        if not nodes:  # which would stand for all
            shutil.copyfile(self._path, target)
            return 0.0
        quantize_static(
            str(self._path),
            str(target),
            _Reader(inputs),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(HEAVY),
            nodes_to_quantize=nodes,
            per_channel=True,
            activation_type=QuantType.QInt8 if self._symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # TensorRT adds biases as they are; ONNX Runtime's kernels want them as int32.
            extra_options={"ActivationSymmetric": self._symmetric, "QuantizeBias": not self._symmetric},
        )
        return worst_rms(self._truth, self._run(target), self._info)

    def _run(self, path: Path) -> list[Tensor]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        parts = [session.run(None, {name: part.numpy()}) for part in torch.split(self._batch, self._info.batch)]
        return [torch.from_numpy(np.concatenate(outputs)) for outputs in zip(*parts, strict=True)]


class _Reader:
    """Hands calibration inputs to ONNX Runtime."""

    def __init__(self, inputs: list[NDArray[np.float32]]) -> None:
        self._inputs = iter(inputs)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next input by name, None at the end."""
        batch = next(self._inputs, None)
        return None if batch is None else {"images": batch}


def quantize_openvino(model: Any, calibration: Calibration, info: ModelInfo) -> tuple[Any, list[str]]:
    """Quantise a model of OpenVINO; return it and the operations that stayed in float32.

    NNCF puts operations back into float32, those that cost most first, until the error is small enough. What follows
    the last convolutions and matrix products stays in float32: 8 bits are too few for the coordinates of boxes.
    """
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise UnsupportedError(f"int8 for OpenVINO needs nncf ({error}); pip install 'visionattn[openvino]'") from error
    nncf.set_log_level(logging.ERROR)
    judging = calibration.sample(info)
    batches = [part.numpy() for part in torch.split(judging, info.batch)]
    exact = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    truth = _outputs(exact, batches)

    def closeness(compiled: Any, data: Any) -> tuple[float, None]:
        """1 for no error: NNCF takes what is larger for better."""
        found = _outputs(compiled, list(data))
        return 1 - worst_rms([part[: len(got)] for part, got in zip(truth, found, strict=True)], found, info), None

    quantized = nncf.quantize_with_accuracy_control(
        model,
        calibration_dataset=nncf.Dataset(list(calibration.inputs(info))),
        validation_dataset=nncf.Dataset(batches),
        validation_fn=closeness,
        max_drop=calibration.tolerance,
        drop_type=nncf.DropType.ABSOLUTE,
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=_after_last_products(model), validate=False),
        subset_size=len(calibration.images),
    )
    return quantized, _kept(quantized)


def _outputs(compiled: Any, batches: list[NDArray[np.float32]]) -> list[Tensor]:
    parts = [[output.copy() for output in compiled(batch).values()] for batch in batches]
    return [torch.from_numpy(np.concatenate(outputs)) for outputs in zip(*parts, strict=True)]


def _after_last_products(model: Any) -> list[str]:
    """Return the operations that no convolution or matrix product comes after."""
    nodes = model.get_ordered_ops()
    before: set[str] = set()
    for node in reversed(nodes):
        if node.get_type_name() in PRODUCTS or node.get_friendly_name() in before:
            before.add(node.get_friendly_name())
            before |= {value.get_node().get_friendly_name() for value in node.input_values()}
    return [node.get_friendly_name() for node in nodes if node.get_friendly_name() not in before]


def _kept(model: Any) -> list[str]:
    """Return the convolutions and matrix products that compute in float32."""
    operations = [node for node in model.get_ordered_ops() if node.get_type_name() in PRODUCTS]
    return [node.get_friendly_name().removesuffix("/WithoutBiases") for node in operations if not _is_int8(node)]


def _is_int8(operation: Any) -> bool:
    """Whether the second operand, the weights mostly, comes of 8-bit numbers by nothing but scaling and reshaping."""
    value = operation.input_value(1)
    while value.get_node().get_type_name() in ("Reshape", "Transpose", "Multiply", "Subtract", "Convert"):
        value = value.get_node().input_value(0)
    return value.get_node().get_type_name() == "FakeQuantize" or value.get_element_type().to_string() in ("i8", "u8")
