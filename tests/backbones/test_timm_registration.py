"""Every mechanism in stock timm vision transformers, by name."""

import subprocess
import sys
from contextlib import suppress
from functools import cache

import pytest
import timm
import torch

from visionattn.attention import ATTENTION

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
@pytest.mark.parametrize("name", ATTENTION)
def test_every_stock_model_that_takes_attn_layer(name: str) -> None:
    stock = stock_with_attn_layer()
    assert len(stock) > 150
    for model, parameters in stock.items():
        ours = timm.create_model(model, attn_layer=name, device="meta")
        assert set(ours.state_dict()) == parameters, model


def test_import_alone_registers() -> None:
    code = "import timm, visionattn; timm.create_model('vit_tiny_patch16_224', attn_layer='ela_hadamard')"
    subprocess.run([sys.executable, "-c", code], check=True)
