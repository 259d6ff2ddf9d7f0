"""Networks with a chosen mechanism to export and measure: a flat vision transformer and a YOLO-LAT."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from visionattn.choices import Dynamic, Precision
from visionattn.deployment.info import ModelInfo
from visionattn.deployment.network import Network, TimmNetwork
from visionattn.deployment.verify import photographs
from visionattn.detection import LAT, MODELS, YOLOLAT, DetectionNetwork, build_detector, load_detector

SCALE = 4.0
"""Standard deviation of queries, keys and values in a network that is stretched."""


def vit(
    mechanism: str,
    precision: Precision,
    size: tuple[int, int],
    dynamic: tuple[Dynamic, ...] = (),
    depth: int = 12,
    stretched: bool = False,
) -> Network:
    """Return ``vit_tiny_patch16_224`` with a mechanism, untrained, of some depth."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        attn_layer=mechanism,
        num_classes=100,
        depth=depth,
        img_size=224 if dynamic else size,
        dynamic_img_size="size" in dynamic,
    ).eval()
    if stretched:
        sample = torch.randn(2, 3, *((224, 224) if dynamic else size))
        _stretch([_projection(block) for block in model.blocks], model, sample)
    info = ModelInfo(
        task="classify",
        names={index: str(index) for index in range(100)},
        size=size,
        stride=16,
        precision=precision,
        dynamic=dynamic,
        preprocessing=timm.data.resolve_model_data_config(model),
        model=f"vit_tiny_patch16_224 {mechanism}",
    )
    truth = TimmNetwork(model, False).eval().requires_grad_(False)
    half = TimmNetwork(copy.deepcopy(model), True).eval().requires_grad_(False) if precision == "fp16" else truth
    return Network(half, truth, info)


def yolo_lat(
    weights: Path,
    mechanism: str,
    precision: Precision,
    size: tuple[int, int],
    dynamic: tuple[Dynamic, ...] = (),
    stretched: bool = False,
) -> Network:
    """Return a trained ``yolo-lat-n`` with another mechanism in the place of its own, and the weights that fit."""
    detector = _detector(weights, mechanism)
    if stretched:
        blocks = [module for module in detector.model.modules() if isinstance(module, LAT)]
        _stretch([block.qkv.bn for block in blocks], detector.model, _pictures(detector))
    info = ModelInfo(
        task="detect",
        names=dict(detector.names),
        size=size,
        stride=32,
        precision=precision,
        dynamic=dynamic,
        model=f"yolo-lat-n {mechanism}",
    )
    truth = DetectionNetwork(detector).eval()
    return Network(DetectionNetwork(detector, half=True).eval() if precision == "fp16" else truth, truth, info)


def _detector(weights: Path, mechanism: str) -> YOLOLAT:
    trained: Any = load_detector(weights)
    description = yaml.safe_load(MODELS["yolo-lat-n"].read_text(encoding="utf-8"))
    description |= {"scale": "n", "nc": len(trained.names)}
    for row in (*description["backbone"], *description["head"]):
        if row[2] == "LAT":
            row[3] = [*row[3][:2], mechanism]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "subject.yaml"
        file.write_text(yaml.safe_dump(description), encoding="utf-8")
        detector = build_detector(str(file))
    network: Any = detector.model
    own = network.state_dict()
    known = {key: value for key, value in trained.model.state_dict().items() if own[key].shape == value.shape}
    network.load_state_dict(known, strict=False)
    return detector


def _pictures(detector: YOLOLAT) -> Tensor:
    return photographs(ModelInfo(task="detect", names=dict(detector.names), size=(320, 320), stride=32), 2, (320, 320))


@torch.inference_mode()
def rounded(module: nn.Module, images: Tensor) -> Tensor:
    """Run a float32 network whose queries, keys and values alone are rounded to float16."""
    layers = [_projection(block) for block in module.modules() if isinstance(block, Block)]
    layers += [block.qkv for block in module.modules() if isinstance(block, LAT)]
    hooks = [layer.register_forward_hook(lambda _, inputs, output: output.half().float()) for layer in layers]
    output: Tensor = module(images)
    for hook in hooks:
        hook.remove()
    return output


def _projection(block: Any) -> nn.Module:
    """Return what makes queries, keys and values of a block: a projection, or the norm where there is none."""
    made: nn.Module = block.norm1 if isinstance(block.attn.qkv, nn.Identity) else block.attn.qkv
    return made


@torch.no_grad()
def _stretch(layers: list[nn.Module], model: nn.Module, images: Tensor) -> None:
    """Scale the outputs of layers, one after the other, to a standard deviation of :data:`SCALE`."""

    def scale(module: Any, inputs: Any, output: Tensor) -> Tensor:
        factor = SCALE / output.std()
        module.weight *= factor
        if module.bias is not None:
            module.bias *= factor
        return output * factor

    hooks = [layer.register_forward_hook(scale) for layer in layers]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
