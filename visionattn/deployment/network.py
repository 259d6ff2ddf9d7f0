"""From weights, a timm name or a model yaml to a network that can be captured, and its description."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from visionattn.backbones.classifier import create_model, has_fixed_size, load_classifier
from visionattn.choices import NMS, Dynamic, Precision
from visionattn.deployment.info import ModelInfo
from visionattn.deployment.nms import EmbeddedNMS, Thresholds
from visionattn.detection import DetectionNetwork, build_detector, classes_and_size
from visionattn.errors import ConfigError, UnsupportedError
from visionattn.record import environment


@dataclass(frozen=True)
class Request:
    """What to make of some weights.

    Attributes:
        weights: a ``.pt`` detector or ``.safetensors`` classifier, a model yaml or packaged detector, or a timm name.
        size: (H, W) of the input in pixels; None: as trained.
        batch: images of a batch.
        dynamic: which of ``batch`` and ``size`` a caller of the network may choose.
        precision: ``int8`` networks start as ``fp32``.
        nms: of a detector: ``none``, ``embedded``, ``free`` or ``peaks``.
        thresholds: of an embedded suppression.
        features: the feature maps of a timm model instead of its logits.
        model_kwargs: further arguments of ``timm.create_model``.
        trust: load a ``.pt`` as a plain pickle, which may run any code.
    """

    weights: str
    size: tuple[int, int] | None = None
    batch: int = 1
    dynamic: tuple[Dynamic, ...] = ()
    precision: Precision = "fp32"
    nms: NMS = "none"
    thresholds: Thresholds = field(default_factory=Thresholds)
    features: bool = False
    model_kwargs: dict[str, Any] | None = None
    trust: bool = False


@dataclass(frozen=True)
class Network:
    """A module in evaluation mode, float32 images (B, 3, H, W) to one or more float32 tensors.

    Attributes:
        module: in the precision asked for.
        truth: the same weights in float32.
        info: what it is.
    """

    module: nn.Module
    truth: nn.Module
    info: ModelInfo


def load_network(request: Request) -> Network:
    """Build the network that a request asks for; what has no weights yet is drawn from a seed, always the same.

    Raises:
        ConfigError: an option or the size does not fit the model.
        WeightsError: the weights are missing, damaged or unsafe to load.
        UnsupportedError: the model does not offer what is asked.
    """
    if request.batch < 1:
        raise ConfigError(f"got batch {request.batch}, expected 1 or more")
    path = Path(request.weights)
    make = _detector if path.suffix in (".pt", ".yaml", ".yml") or request.weights.startswith("yolo-lat") else _of_timm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make(request)
    info = network.info
    chosen = request.size is not None or "size" in info.dynamic
    if chosen and any(side < info.stride or side % info.stride for side in info.size):
        raise ConfigError(f"size {info.size}: both sides must be multiples of the model's stride, {info.stride}")
    if "size" in info.dynamic and min(info.size) < 2 * info.stride:
        raise ConfigError(f"size {info.size}: with a dynamic size give at least {2 * info.stride} on both sides")
    return network


def _detector(request: Request) -> Network:
    if request.features or request.model_kwargs:
        raise ConfigError(f"{request.weights} is a detector; features and model_kwargs are for models of timm")
    detector = build_detector(request.weights, request.trust)
    names, side, stride = classes_and_size(detector)

    def made(half: bool) -> nn.Module:
        network = DetectionNetwork(detector, "none" if request.nms == "embedded" else request.nms, half)
        return (EmbeddedNMS(network, request.thresholds) if request.nms == "embedded" else network).eval()

    truth = made(False)
    thresholds: dict[str, Any] = vars(request.thresholds) if request.nms == "embedded" else {}
    return Network(
        made(True) if request.precision == "fp16" else truth,
        truth,
        ModelInfo(
            task="detect",
            names=names,
            size=request.size or (side, side),
            stride=stride,
            nms=request.nms,
            **thresholds,
            **_common(request),
        ),
    )


def _of_timm(request: Request) -> Network:
    if request.nms != "none":
        raise ConfigError(f"nms={request.nms}: {request.weights} is no detector; leave it at none")
    options = dict(request.model_kwargs or {})
    if request.weights.endswith(".safetensors"):
        if request.features:
            raise UnsupportedError("features: give the name of a timm model; a .safetensors of ours is a classifier")
        found = load_classifier(request.weights, options=options)
        name, names, config = found.name, found.classes, found.data_config
        model: Any = found.model
    else:
        name = request.weights
        model = create_model(name, options | ({"features_only": True} if request.features else {}))
        names = [] if request.features else [str(index) for index in range(model.num_classes)]
        config = resolve_model_data_config(model)
    size = request.size or tuple(config["input_size"][-2:])
    if size != tuple(config["input_size"][-2:]) and has_fixed_size(name):
        getattr(model, "model", model).set_input_size(img_size=size)
    truth = TimmNetwork(model, False).eval().requires_grad_(False)
    half = request.precision == "fp16"
    return Network(
        TimmNetwork(copy.deepcopy(model), True).eval().requires_grad_(False) if half else truth,
        truth,
        ModelInfo(
            task="features" if request.features else "classify",
            names=dict(enumerate(names)),
            size=size,
            stride=_stride(model),
            preprocessing=config | {"input_size": (3, *size)},
            **_common(request),
        ),
    )


def _common(request: Request) -> dict[str, Any]:
    return {
        "batch": request.batch,
        "dynamic": request.dynamic,
        "precision": request.precision,
        "model": request.weights,
        "environment": environment(),
    }


class TimmNetwork(nn.Module):
    """A timm model in the precision asked for, with float32 at both ends."""

    def __init__(self, model: nn.Module, half: bool) -> None:
        super().__init__()
        self.model, self.half_precision = model.half() if half else model, half

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = self.model(images.half() if self.half_precision else images)
        return outputs.float() if isinstance(outputs, Tensor) else tuple(output.float() for output in outputs)


def _stride(model: Any) -> int:
    info = model.feature_info
    reductions = info.reduction() if hasattr(info, "reduction") else [level["reduction"] for level in info]
    return int(max(reductions))
