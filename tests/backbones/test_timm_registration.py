"""Every mechanism in stock timm vision transformers, by name."""

import subprocess
import sys
from contextlib import suppress
from functools import cache

import pytest
import timm
import torch

from visionattn.attention import ATTENTION
from visionattn.errors import UnsupportedError

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
MODULES = ["vision_transformer", "vision_transformer_hybrid", "vitamin", "deit", "naflexvit"]


@pytest.mark.parametrize("name", ATTENTION)
def test_trains_in_a_stock_vit(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", attn_layer=name, **SMALL)
    assert all(isinstance(block.attn, ATTENTION[name]) for block in model.blocks)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("stock", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "flexivit_small"])
def test_rectangles(name: str, stock: str) -> None:
    model = timm.create_model(stock, attn_layer=name, **{**SMALL, "img_size": (64, 96)}).eval()
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5)


@cache
def stock_with_attn_layer() -> dict[str, set[str]]:
    """Stock models that take ``attn_layer``, with their parameter names."""
    models = {}
    for name in [name for module in MODULES for name in timm.list_models(module=module)]:
        with suppress(TypeError):
            models[name] = set(timm.create_model(name, attn_layer="attn", device="meta").state_dict())
    return models


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ela_hadamard", "dark", "gka"])  # timm's parameters, more of them, fewer
def test_every_stock_model_that_takes_attn_layer(name: str) -> None:
    stock = stock_with_attn_layer()
    assert len(stock) > 150
    refused = set()
    for model, parameters in stock.items():
        try:
            ours = set(timm.create_model(model, attn_layer=name, device="meta").state_dict())
        except UnsupportedError:
            refused.add(model)
            assert any(".q_norm." in parameter for parameter in parameters), model
            continue
        lost = {parameter for parameter in parameters - ours if ".attn.qkv." not in parameter}
        assert not lost, model
        assert parameters <= ours or name == "gka", model
    assert not refused or name == "gka"


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (224, 320)], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_trains_at_full_size(name: str, size: tuple[int, int]) -> None:
    model = timm.create_model("vit_small_patch16_224", attn_layer=name, img_size=size)
    model(torch.randn(1, 3, *size)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_import_alone_registers() -> None:
    code = "import timm, visionattn; timm.create_model('vit_tiny_patch16_224', attn_layer='ela_hadamard')"
    subprocess.run([sys.executable, "-c", code], check=True)
