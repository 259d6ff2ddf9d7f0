"""convert(): every weight is kept, softmax stays softmax, and what cannot be converted is named."""

import copy
import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import visionattn
from visionattn.attention import ATTENTION
from visionattn.conversion import rebuild
from visionattn.errors import ConfigError, UnknownNameError

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {"img_size": 64}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "embed_dim": 96, "num_heads": 3, "depth": 3}),
    "qk_norm": ("vit_tiny_patch16_224", {"img_size": 64, "qk_norm": True, "depth": 3}),
    "rope": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 3}),
    "rope_separate": ("eva02_base_patch14_224", {"img_size": 56, "embed_dim": 96, "num_heads": 3, "depth": 3}),
    "rope_attention": ("vit_small_patch16_dinov3", {"img_size": 64, "embed_dim": 96, "num_heads": 3, "depth": 3}),
}
TARGETS = [name for name in ATTENTION if name != "gka"]


def build(kind: str) -> Any:
    torch.manual_seed(0)
    name, options = MODELS[kind]
    model: Any = timm.create_model(name, num_classes=5, **options)
    for parameter in model.parameters():  # biases and LayerScale that do something
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def images(model: Any, count: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, *model.patch_embed.img_size)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@torch.no_grad()
def test_softmax_to_softmax_is_the_identity(model: Any) -> None:
    x = images(model)
    student = visionattn.convert(model, "softmax", center_keys=False)
    torch.testing.assert_close(student(x), model(x), rtol=1e-6, atol=1e-6)
    fine = copy.deepcopy(model).double()
    student = visionattn.convert(fine, "softmax", center_keys=True)
    torch.testing.assert_close(student(x.double()), fine(x.double()), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_softmax_keeps_its_answers_when_constant_centres_are_folded() -> None:
    model = build("plain").double()
    x = images(model).double()
    student = visionattn.convert(model, "softmax", center_keys="constant", calibrate=x)
    assert not torch.equal(student.blocks[0].attn.qkv.bias, model.blocks[0].attn.qkv.bias)
    torch.testing.assert_close(student(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:slay. poly=:UserWarning")
@torch.no_grad()
def test_every_mechanism_in_every_kind_of_model(model: Any) -> None:
    x = images(model)
    shapes = [y.shape for y in model.forward_intermediates(x, intermediates_only=True)]
    for name in TARGETS:
        student = visionattn.convert(model, name)
        assert student(x).shape == model(x).shape
        found = student.forward_intermediates(x, intermediates_only=True)
        assert [y.shape for y in found] == shapes
        assert all(y.isfinite().all() for y in found)
        again = rebuild(copy.deepcopy(model), student.attention_layers)
        again.load_state_dict(student.state_dict(), strict=True)
        torch.testing.assert_close(again(x), student(x))


@torch.no_grad()
def test_all_weights_are_kept_and_the_model_is_untouched() -> None:
    model = build("plain")
    before = copy.deepcopy(model.state_dict())
    student = visionattn.convert(model, "ela_hadamard", local=3)
    added = {key for key in student.state_dict() if key not in before}
    assert {key.split(".", 3)[-1] for key in added} == {"local.weight", "local.bias"}
    for key, value in before.items():
        assert torch.equal(student.state_dict()[key], value)
        assert torch.equal(model.state_dict()[key], value)
    assert not any(student.state_dict()[key].any() for key in added)  # no effect at the start
    x = images(model)
    torch.testing.assert_close(student(x), visionattn.convert(model, "ela_hadamard")(x))


@torch.no_grad()
def test_projections_of_eva_are_packed() -> None:
    model = build("rope_separate")
    attention = model.blocks[1].attn
    student = visionattn.convert(model, "relu")
    weight = torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
    assert torch.equal(student.blocks[1].attn.qkv.weight, weight)
    assert torch.equal(student.blocks[1].attn.qkv.bias.chunk(3)[1], torch.zeros(96))  # EVA's keys have no bias


@torch.no_grad()
def test_local_convolution_gets_the_grid_of_each_image() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, dynamic_img_size=True, depth=2)
    student = visionattn.convert(model.eval(), "relu", local=3).eval()
    for block in student.blocks:
        nn.init.normal_(block.attn.local.weight)
    twin = copy.deepcopy(student)
    for shape in ((64, 64), (32, 96)):
        x = torch.randn(1, 3, *shape)
        seen = []
        handle = student.blocks[0].attn.register_forward_hook(lambda m, a, o, seen=seen: seen.append((a[0], o)))
        student(x)
        handle.remove()
        tokens, out = seen[0]
        expected = student.blocks[0].attn.forward(tokens, grid=(shape[0] // 16, shape[1] // 16))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(twin(x), student(x))


def test_kept_blocks_are_those_named() -> None:
    model = build("plain")
    student = visionattn.convert(model, "relu", keep_softmax=[0, -1])
    kinds = [type(block.attn) is type(model.blocks[0].attn) for block in student.blocks]
    assert kinds == [True, *[False] * 10, True]
    assert list(student.attention_layers) == [f"blocks.{index}.attn" for index in range(1, 11)]


class Twice(nn.Module):
    """A user's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = timm.layers.Attention(24, 3), nn.MultiheadAttention(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def test_own_modules_and_what_stays_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "visionattn"):
        student = visionattn.convert(Twice(), "elu")
    assert isinstance(student.first, ATTENTION["elu"])
    assert "second keeps its attention: MultiheadAttention is neither" in caplog.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "relative positions"),
        ("samvit_base_patch16", "relative positions"),
        ("resnet18", "has no attention"),
    ],
)
def test_models_that_cannot_be_converted_say_why(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ConfigError, match=reason):
        visionattn.convert(model, "relu")


def test_bad_arguments_are_named() -> None:
    model = build("plain")
    x = images(model)
    for options, message in (
        ({"keep_softmax": [12]}, "12 blocks, 0 to 11"),
        ({"keep_softmax": list(range(12))}, "keeps all 12"),
        ({"center_keys": "constant"}, "give some as calibrate"),
        ({"calibrated": True}, "give some as calibrate"),
        ({"featurs": 3}, "featurs"),
        ({"calibrate": []}, "there are none"),
        ({"calibrate": ["x"]}, "got str"),
        ({"calibrate": x[0]}, "got Tensor"),
    ):
        with pytest.raises(ConfigError, match=message):
            visionattn.convert(model, "performer", **options)
    with pytest.raises(UnknownNameError, match="performer"):
        visionattn.convert(model, "preformer")
    with pytest.raises(ConfigError, match="gka has no queries"):
        visionattn.convert(model, "gka")
    with pytest.raises(ConfigError, match=r"constant.*turns or normalises"):
        visionattn.convert(build("rope"), "relu", center_keys="constant", calibrate=x)
    gated = timm.layers.Attention(24, 3, gated=True)
    with pytest.raises(ConfigError, match="gate"):
        visionattn.convert(nn.Sequential(gated), "relu")


PAGE = Path(__file__).parents[2] / "docs" / "convert.md"


def test_every_option_is_in_the_docs() -> None:
    table = PAGE.read_text().split("## Options")[1].split("\n\n**")[0]
    options = set(inspect.signature(visionattn.convert).parameters) - {"model", "options"}
    assert options <= set(re.findall(r"`(\w+)", table))


@pytest.mark.parametrize("name", ["ela_hadamard", "performer"])
def test_converted_models_export(model: Any, name: str) -> None:
    x = images(model, 24)
    local = 3 if hasattr(model.patch_embed, "dynamic_feat_size") else 0
    student = visionattn.convert(model, name, calibrate=x, local=local)
    with torch.no_grad():
        expected = student(x[:2])
        program = torch.export.export(student, (x[:2],))
        torch.testing.assert_close(program.module()(x[:2]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@torch.no_grad()
def test_plain_models_can_be_scripted() -> None:
    model = build("plain")
    student = visionattn.convert(model, "ela_hadamard")
    x = images(model)
    torch.testing.assert_close(torch.jit.script(student)(x), student(x))


@torch.no_grad()
def test_our_own_softmax_is_converted_too() -> None:
    model = build("plain")
    ours = visionattn.convert(model, "softmax", center_keys=False)
    x = images(model)
    torch.testing.assert_close(visionattn.convert(ours, "relu")(x), visionattn.convert(model, "relu")(x))


@pytest.mark.parametrize(
    "name",
    [
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_clip_224",
        "eva02_small_patch14_224",
        "vit_small_patch16_dinov3",
        "vit_pe_core_tiny_patch16_384",
        "vit_small_patch16_rope_224",
    ],
)
def test_families_of_timm(name: str) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    student = visionattn.convert(model, "ela_hadamard")
    assert list(student.attention_layers) == [f"blocks.{index}.attn" for index in range(12)]


def test_backbones_that_return_features_are_converted() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, features_only=True).eval()
    student = visionattn.convert(model, "relu")
    with torch.no_grad():
        assert [y.shape for y in student(torch.randn(1, 3, 64, 64))] == [(1, 192, 4, 4)] * 3
    with pytest.raises(ConfigError, match=r"local.*patch embedding"):
        visionattn.convert(model, "relu", local=3)
