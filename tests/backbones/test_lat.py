"""The hierarchical transformers: maps of the right sizes and values for any image, and timm's interface around them."""

import math
from itertools import product
from typing import Any

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from timm.models._hub import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torch.nn import functional as F

from visionattn.attention import ATTENTION
from visionattn.backbones.lat import Lat, LatBlock
from visionattn.errors import ConfigError, UnknownNameError

PARAMETERS = {"nano": (3e6, 4e6), "tiny": (8e6, 10e6), "small": (24e6, 26e6), "base": (50e6, 60e6)}
SMALL = {"widths": (16, 16, 32, 32), "depths": (1, 1, 2, 1), "head_dim": 8, "num_classes": 5}
SIZES = [(64, 96), (33, 70), (1, 1)]


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("lat_nano", **SMALL | options).eval()


def images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width)


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_size_trains(size: str) -> None:
    model = timm.create_model(f"lat_{size}")
    least, most = PARAMETERS[size]
    assert least < sum(p.numel() for p in model.parameters()) < most
    assert {type(stage.blocks[0].attn) for stage in model.stages} == {ATTENTION["ela_hadamard"]}
    model(images(64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("grid", [(3, 5), (7, 2), (1, 1)], ids=str)
def test_a_block_by_hand(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = LatBlock(8, head_dim=4).double().eval()
    x = torch.randn(2, 8, *grid, dtype=torch.float64)

    def depthwise(convolution: Any, cells: dict[tuple[int, int], Tensor]) -> dict[tuple[int, int], Tensor]:
        near = {(r, c): [(i, j) for i, j in cells if abs(i - r) <= 1 and abs(j - c) <= 1] for r, c in cells}
        weight = convolution.weight[:, 0]
        return {
            (r, c): convolution.bias + sum(weight[:, i - r + 1, j - c + 1] * cells[i, j] for i, j in near[r, c])
            for r, c in cells
        }

    with torch.no_grad():
        cells = {(r, c): x[:, :, r, c] for r, c in product(*map(range, grid))}
        told = depthwise(block.position, cells)
        tokens = torch.stack([cells[place] + told[place] for place in cells], 1)
        q, k, v = (
            part.unflatten(2, (2, 4)).transpose(1, 2) for part in block.attn.qkv(block.norm1(tokens)).chunk(3, -1)
        )
        mixed = block.attn.reference(q, k, v).transpose(1, 2).flatten(2)
        values = v.transpose(1, 2).flatten(2)
        local = depthwise(block.attn.local, dict(zip(cells, values.unbind(1), strict=True)))
        tokens = tokens + block.attn.proj(mixed + torch.stack([*local.values()], 1))
        tokens = tokens + block.mlp(block.norm2(tokens))
        got = block(x)
    for i, (r, c) in enumerate(cells):
        torch.testing.assert_close(got[:, :, r, c], tokens[:, i])


@pytest.mark.parametrize("name", ATTENTION)
def test_every_attention_trains_on_rectangles(name: str) -> None:
    model = make(attn_layer=name).train()
    assert all(isinstance(b.attn, ATTENTION[name]) for b in model.modules() if isinstance(b, LatBlock))
    for height, width in ((64, 96), (40, 33)):
        model.zero_grad()
        model(images(height, width)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("way", ["list", "getter"])
def test_maps_of_any_image(size: tuple[int, int], way: str) -> None:
    model, features = make(), make(features_only=True, feature_cls=way)
    x = images(*size)
    assert features.feature_info.channels() == [16, 16, 32, 32]
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        maps = features(x)
        final, expected = model.forward_intermediates(x)
        torch.testing.assert_close(maps, expected)
        torch.testing.assert_close(model.forward_features(x), final)
        torch.testing.assert_close(model.norm(expected[-1]), final)
        torch.testing.assert_close(model(x), F.linear(final.mean((2, 3)), model.head.fc.weight, model.head.fc.bias))
    for one, channels, stride in zip(maps, (16, 16, 32, 32), (4, 8, 16, 32), strict=True):
        assert one.shape == (2, channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))


def test_an_image_is_the_same_in_a_batch() -> None:
    model, x = make(), images(64, 96, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(one) for one in x.split(1)]))


def test_bfloat16_stays_near() -> None:
    model, x = make(), images(64, 96)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
        low = model.bfloat16()(x.bfloat16())
    for got in (mixed, low):
        assert got.dtype == torch.bfloat16
        assert (got - expected).norm() < 0.02 * expected.norm()


def test_tokens_and_maps_share_one_layout() -> None:
    model, shared = make(), []

    def note(module: LatBlock, maps: tuple[Tensor], out: Tensor) -> None:
        shared.append(out.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, LatBlock):
            module.register_forward_hook(note)
            module.norm1.register_forward_hook(lambda _, tokens, out: shared.append(tokens[0].is_contiguous()))
    with torch.no_grad():
        model(images(64, 96))
    assert shared == [True] * 10


def test_recomputation_changes_nothing() -> None:
    states = []
    for on in (False, True):
        model = make().train()
        model.set_grad_checkpointing(on)
        torch.manual_seed(1)
        model(images(64, 64)).square().sum().backward()
        states.append(([p.grad for p in model.parameters()], dict(model.named_buffers())))
    torch.testing.assert_close(states[0], states[1])


def test_pooling_and_head_can_be_replaced() -> None:
    model, x = make(), images(64, 64)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(3, "avgmax")
    assert (model(x).shape, model.num_classes) == ((2, 3), 3)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))


def test_mechanisms_of_the_stages() -> None:
    names = ["elu", "ela_hadamard", "softmax", "relu"]
    assert [type(stage.blocks[0].attn) for stage in make(attn_layer=names).stages] == [ATTENTION[n] for n in names]
    with pytest.raises(ConfigError, match=r"got 2 names.*4 stages"):
        make(attn_layer=("elu", "softmax"))
    with pytest.raises(UnknownNameError, match="nearest: softmax"):
        make(attn_layer="softmac")
    with pytest.raises(ConfigError, match="head_dim=12 does not divide the width 16"):
        make(head_dim=12)


def test_stochastic_depth_grows_from_nothing() -> None:
    model = make(drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for block in model.modules() if isinstance(block, LatBlock)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_layer_decay_grows_from_head_to_stem() -> None:
    model = make()
    scales = {id(p): g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]}
    of = {name: scales[id(p)] for name, p in model.named_parameters()}
    order = ["stem.0.0.weight", "stages.0.blocks.0.mlp.fc1.weight", "stages.2.blocks.0.mlp.fc1.weight"]
    order += ["stages.2.blocks.1.mlp.fc1.weight", "stages.3.blocks.0.mlp.fc1.weight", "head.fc.weight"]
    assert [of[name] for name in order] == [0.5**depth for depth in (6, 5, 3, 2, 1, 0)]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_and_traced_models_take_other_sizes() -> None:
    model, features = make(), make(features_only=True, feature_cls="getter")
    traced = create_feature_extractor(model, ["head"])
    scripted, scripted_features = torch.jit.script(model), torch.jit.script(features)
    for size in SIZES:
        x = images(*size)
        with torch.no_grad():
            torch.testing.assert_close(traced(x)["head"], model(x))
            torch.testing.assert_close(scripted(x), model(x))
            torch.testing.assert_close(scripted_features(x), features(x))


def test_exported_model_takes_other_sizes() -> None:
    model = make(depths=(1, 1, 1, 1))
    height, width = (torch.export.Dim(side, min=64, max=2048) for side in ("height", "width"))
    shapes = {"x": {0: torch.export.Dim("batch"), 2: height, 3: width}}
    program = torch.export.export(model, (images(96, 160),), dynamic_shapes=shapes).module()
    for size, batch in (((64, 128), 3), ((161, 70), 1)):
        x = images(*size, batch)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("name", ATTENTION)
def test_init_weights_leaves_nothing_unset(name: str) -> None:
    model = make(attn_layer=name, device="meta").to_empty(device="cpu")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    model.init_weights()
    assert [n for n, tensor in tensors.items() if not tensor.isfinite().all()] == []
    assert model(images(32, 64)).isfinite().all()


def test_a_saved_model_is_built_again(tmp_path) -> None:
    model = make(attn_layer=("elu", "elu", "softmax", "softmax"), local=5)
    model.reset_classifier(3)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(again, Lat)
    x = images(64, 96)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
