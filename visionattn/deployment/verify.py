"""Whether a file computes what the weights compute: the two are run on the same images and compared."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionattn.deployment.info import ModelInfo
from visionattn.deployment.inputs import prepare
from visionattn.deployment.network import Network
from visionattn.deployment.parity import Error, Parity, errors_of
from visionattn.deployment.session import Session
from visionattn.errors import ParityError

Images = Callable[[ModelInfo, int, tuple[int, int]], Tensor]
"""Of a network, a batch and a size (H, W): inputs to compare on, (B, 3, H, W)."""


def compare(network: Network, session: Session, images_of: Images) -> Parity:
    """Run weights and file on the same images, at several sizes and batches if the file takes any.

    Args:
        network: the weights.
        session: the file in its runtime.
        images_of: gives the images.

    Raises:
        ParityError: the file does not run at a size that it should take, or gives outputs of another shape.
    """
    errors: list[Error] = []
    for batch, size in trials_of(session.info):
        images = images_of(session.info, batch, size)
        try:
            found = session(images)
        except Exception as error:  # a runtime refuses what it likes
            raise ParityError(
                f"{session.info.model}: the file does not take {batch} images of {size}: {error}; export it anew"
            ) from error
        with torch.inference_mode():
            outputs = network.truth(images)
        expected = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        found_errors = errors_of(expected, found, session.info)
        errors += [error.model_copy(update={"batch": batch, "size": size}) for error in found_errors]
    return Parity(session.info.precision, errors)


def trials_of(info: ModelInfo) -> list[tuple[int, tuple[int, int]]]:
    """Return how many images of which sizes to try: eight at the size asked for, fewer at others that the file takes.

    Eight are mostly more than a fixed batch, so that it is filled up and split.
    """
    (H, W), stride = info.size, info.stride
    trials = [(max(8, info.batch + 1), info.size)]
    most = info.max_size or (H, W + 2 * stride)
    if "size" in info.dynamic:
        small = max(H // 2 // stride, 2) * stride, max(W // 2 // stride, 2) * stride
        trials += [(1, (H, min(W + 2 * stride, most[1]))), (2, small), (1, small)]
    return [*trials, (1, info.size)]


def photographs(info: ModelInfo, batch: int, size: tuple[int, int]) -> Tensor:
    """Return pieces of two photographs that scikit-learn brings, as the network takes them: (batch, 3, H, W)."""
    return prepare([piece(index, size) for index in range(batch)], info, size)


@cache
def _photos() -> list[NDArray[np.uint8]]:
    from sklearn.datasets import load_sample_images  # a second of imports that only exports need

    return [photo[..., ::-1] for photo in load_sample_images().images]  # blue first


def piece(index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Cut one of many pieces of the photographs and bring it to a size (H, W): BGR, (H, W, 3). The fifth is black."""
    if index == 4:
        return np.zeros((*size, 3), np.uint8)
    photo = _photos()[index % 2]
    rng = np.random.default_rng(index)
    height, width = photo.shape[:2]
    scale = min(height / size[0], width / size[1]) * rng.uniform(0.6, 1)
    h, w = max(int(size[0] * scale), 1), max(int(size[1] * scale), 1)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    cut = np.ascontiguousarray(photo[top : top + h, left : left + w])
    fitted = cv2.resize(cut, size[::-1], interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(fitted[:, ::-1] if index % 3 == 1 else fitted, dtype=np.uint8)


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
