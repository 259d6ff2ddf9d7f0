"""The flat grid-aware transformers: right on any grid, and timm's own in everything else."""

from functools import cache
from itertools import product
from typing import Any

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from timm.models._hub import save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.attention import ATTENTION, Attention, attention_layer
from visionattn.backbones import VitLat
from visionattn.blocks import HyperLinkBlock
from visionattn.errors import ConfigError, UnknownNameError, UnsupportedError

PARAMETERS = {"tiny": 5.70e6, "small": 22.02e6, "base": 86.51e6}
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
PREFIX = {"class_token": True, "reg_tokens": 2, "global_pool": "token"}
GRIDS = [(3, 5), (7, 2), (1, 4), (1, 1)]


def make(**options: Any) -> VitLat:
    torch.manual_seed(0)
    return timm.create_model("vit_lat_tiny_patch16_224", **SMALL | options).eval()


def images(rows: int, columns: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16 * rows, 16 * columns)


def by_hand(model: VitLat, image: Tensor) -> Tensor:
    """The tokens after the last block, with every patch put in its place explicitly."""
    rows, columns = image.shape[2] // 16, image.shape[3] // 16
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    cells = list(product(range(rows), range(columns)))
    patches = [image[..., 16 * r : 16 * r + 16, 16 * c : 16 * c + 16] for r, c in cells]
    x = torch.stack([torch.einsum("bcij,dcij->bd", patch, weight) + bias for patch in patches], 1)
    tokens = [t.expand(len(x), -1, -1) for t in (model.cls_token, model.reg_token) if t is not None]
    prefix = model.num_prefix_tokens
    x = torch.cat([*tokens, x], 1)
    for block in model.blocks:
        attention = block.attn
        y = block.norm1(x)
        q, k, v = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in attention.qkv(y).chunk(3, -1))
        mixed = attention.reference(q, k, v).transpose(1, 2).flatten(2)
        values = v.transpose(1, 2).flatten(2)
        for i, (r, c) in enumerate(cells):
            near = attention.local.bias
            for (j, (s, t)), offset in product(enumerate(cells), product((-1, 0, 1), repeat=2)):
                if (s, t) == (r + offset[0], c + offset[1]):
                    near = near + attention.local.weight[:, 0, offset[0] + 1, offset[1] + 1] * values[:, prefix + j]
            mixed[:, prefix + i] += near
        x = x + attention.proj(mixed)
        x = x + block.mlp(block.norm2(x))
    return x


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_size_trains(size: str) -> None:
    model = timm.create_model(f"vit_lat_{size}_patch16_224", num_classes=5)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[size], rel=0.05)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("prefix", [{}, PREFIX], ids=["patches", "prefix"])
def test_the_convolution_sees_the_grid(grid: tuple[int, int], prefix: dict[str, Any]) -> None:
    model, x = make(**prefix).double(), images(*grid).double()
    with torch.no_grad():
        tokens, (tap,) = model.forward_intermediates(x, indices=[-1])
        expected = by_hand(model, x)
        torch.testing.assert_close(tokens, model.norm(expected))
        torch.testing.assert_close(model.forward_features(x), model.norm(expected))
        torch.testing.assert_close(tap.flatten(2).transpose(1, 2), expected[:, model.num_prefix_tokens :])


@pytest.mark.parametrize("name", ATTENTION)
def test_every_attention_takes_rectangles_and_trains(name: str) -> None:
    model = make(attn_layer=name, depth=2).train()
    assert all(isinstance(block.attn, ATTENTION[name]) and block.attn.local is not None for block in model.blocks)
    same = make(attn_layer=ATTENTION[name], depth=2)
    assert same.state_dict().keys() == model.state_dict().keys()
    for grid in ((3, 5), (4, 2)):
        model.zero_grad()
        model(images(*grid)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@cache
def stock_and_ours(**options: Any) -> tuple[nn.Module, nn.Module]:
    """timm's own vision transformer and ours without convolution, with the same weights."""
    common = {"pos_embed": "learn", **options}
    stock = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **SMALL, **common).eval()
    ours = make(attn_layer="softmax", local=0, **common)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@pytest.mark.parametrize("prefix", [{"class_token": False, "global_pool": "avg"}, PREFIX], ids=["patches", "prefix"])
def test_without_convolution_it_is_timms_own(prefix: dict[str, Any]) -> None:
    stock, ours = stock_and_ours(**prefix)
    mask = torch.rand(2, 1, 1, 15 + stock.num_prefix_tokens) > 0.3
    mask[..., 0] = True
    with torch.no_grad():
        x = images(3, 5)
        torch.testing.assert_close(ours(x), stock(x))
        torch.testing.assert_close(ours(x, attn_mask=mask), stock(x, attn_mask=mask))
        torch.testing.assert_close(ours(x, is_causal=True), stock(x, is_causal=True))


@pytest.mark.parametrize("prefix", [{"class_token": False, "global_pool": "avg"}, PREFIX], ids=["patches", "prefix"])
@pytest.mark.parametrize("indices", [None, 2, [0, -2]], ids=str)
def test_intermediates_are_timms_own(indices: Any, prefix: dict[str, Any]) -> None:
    stock, ours = stock_and_ours(**prefix)
    x = images(3, 5)
    flags = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only", "output_dict")
    for chosen in product((False, True), repeat=len(flags)):
        for form in ("NCHW", "NLC"):
            options = {**dict(zip(flags, chosen, strict=True)), "output_fmt": form}
            with torch.no_grad():
                got, expected = (m.forward_intermediates(x, indices, **options) for m in (ours, stock))
            torch.testing.assert_close(got, expected, msg=lambda message, o=options: f"{o}: {message}")


def test_an_image_is_the_same_in_a_batch() -> None:
    model, x = make(), images(3, 5, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(one) for one in x.split(1)]))


def test_bfloat16_stays_near() -> None:
    model, x = make(), images(3, 5)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
        low = model.bfloat16()(x.bfloat16())
    for got in (mixed, low):
        assert got.dtype == torch.bfloat16
        assert (got - expected).norm() < 0.02 * expected.norm()


def test_other_blocks_get_the_grid() -> None:
    model = make(block_fn=HyperLinkBlock)
    assert model(images(3, 5)).shape == (2, 5)
    assert all(isinstance(block, HyperLinkBlock) for block in model.blocks)


def test_recomputation_changes_nothing() -> None:
    model, x = make(), images(2, 3)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_feature_maps() -> None:
    model = make(features_only=True, out_indices=[0, 2])
    assert [tuple(m.shape) for m in model(images(3, 5))] == [(2, 32, 3, 5)] * 2
    assert model.feature_info.channels() == [32, 32]
    assert model.feature_info.reduction() == [16, 16]


@pytest.mark.parametrize("prefix", [{}, PREFIX], ids=["patches", "prefix"])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_and_traced_models_take_other_sizes(prefix: dict[str, Any]) -> None:
    model = make(**prefix)
    traced = create_feature_extractor(model, ["head"])
    scripted = torch.jit.script(model)
    for grid in GRIDS:
        x = images(*grid)
        with torch.no_grad():
            torch.testing.assert_close(traced(x)["head"], model(x))
            torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.parametrize("options", [{}, {**PREFIX, "pos_embed": "learn"}], ids=["patches", "prefix and table"])
def test_exported_model_takes_other_sizes(options: dict[str, Any]) -> None:
    model = make(depth=1, **options)
    height, width = (16 * torch.export.Dim(side, min=2, max=64) for side in ("rows", "columns"))
    shapes = {"x": {0: torch.export.Dim("batch"), 2: height, 3: width}}
    program = torch.export.export(model, (images(3, 5),), dynamic_shapes=shapes).module()
    for grid, batch in (((5, 2), 3), ((14, 14), 1)):
        x = images(*grid, batch)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("name", ATTENTION)
def test_init_weights_leaves_nothing_unset(name: str) -> None:
    model = make(attn_layer=name, device="meta", pos_embed="learn").to_empty(device="cpu")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    model.init_weights()
    assert [n for n, tensor in tensors.items() if not tensor.isfinite().all()] == []
    assert model(images(2, 3)).isfinite().all()


def test_a_resized_model_is_saved_and_built_again(tmp_path) -> None:
    model = make(attn_layer="elu", local=5, pos_embed="learn")
    x = images(3, 5)
    with torch.no_grad():
        before = model(x)
        model.set_input_size((48, 80))
        assert model.pos_embed.shape[1] == 15
        torch.testing.assert_close(model(x), before)  # the table is interpolated once, as it was in each call
        save_for_hf(model, tmp_path)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(again(x), before)
    assert again.blocks[0].attn.local.kernel_size == (5, 5)


def test_a_class_keeps_the_options_that_it_sets() -> None:
    attention = make(attn_layer=attention_layer("gka", window=2)).blocks[0].attn
    assert (attention.window, attention.local.kernel_size) == (2, (3, 3))
    assert not isinstance(make(attn_layer="attn", pos_embed="learn").blocks[0].attn, Attention)


@pytest.mark.parametrize("option", [{"patch_drop_rate": 0.1}, {"dynamic_img_size": False}], ids=str)
def test_what_leaves_no_grid_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        make(**option)


def test_refusals() -> None:
    with pytest.raises(UnknownNameError, match="nearest: ela_hadamard"):
        make(attn_layer="ela_hadamart")
    with pytest.raises(ConfigError, match=r"got 'NHWC'.*NCHW"):
        make().forward_intermediates(images(1, 1), output_fmt="NHWC")
    with pytest.raises(UnsupportedError, match="local=0"):
        make()(images(2, 2), is_causal=True)
    with pytest.raises(AssertionError, match="divisible by patch size"):
        make()(torch.randn(1, 3, 40, 64))


def test_padding_on_request_takes_any_size() -> None:
    model = make(dynamic_img_pad=True)
    x = torch.randn(1, 3, 40, 70)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(F.pad(x, (0, 10, 0, 8))))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "lat_nano"])
def test_no_images_give_no_logits(name: str) -> None:
    """As in timm, of whose models those of a dynamic size, and so vit_lat's, do not take an empty batch."""
    options = {} if name == "lat_nano" else {"depth": 1, "attn_layer": "ela_hadamard"}
    model = timm.create_model(name, num_classes=5, **options)
    for mode in (True, False):
        logits = model.train(mode)(torch.zeros(0, 3, 224, 224))
        assert logits.shape == (0, 5)
    logits.sum().backward()
