"""Blocks and experts in stock timm vision transformers, and what is done with such models."""

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from visionattn.attention import ATTENTION
from visionattn.blocks import HyperLinkBlock, MemoryLobe, MoEMlp, PreNormBlock, balance_loss

BLOCKS = {
    "prenorm": PreNormBlock,
    "hyperlink": HyperLinkBlock,
    "memory": partial(HyperLinkBlock, memory=True),
    "memory-code": partial(HyperLinkBlock, memory=True, ffn_residual=True),
}
MLPS = {"mlp": Mlp, "moe": MoEMlp, "moe-outer": partial(MoEMlp, experts=3, top_k=1, score_bias="outer")}
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def make(block: str, mlp: str, attention: Any = "ela_hadamard", **options: Any) -> nn.Module:
    choice = {"block_fn": BLOCKS[block], "mlp_layer": MLPS[mlp], "attn_layer": attention}
    return timm.create_model("vit_tiny_patch16_224", **SMALL, **choice, **options)


every_pair = [
    pytest.mark.parametrize("block", BLOCKS),
    pytest.mark.parametrize("mlp", MLPS),
]


def pairs(test: Any) -> Any:
    """Run a test over all blocks and MLPs."""
    for mark in every_pair:
        test = mark(test)
    return test


@pairs
def test_every_parameter_learns(block: str, mlp: str, images: Tensor) -> None:
    model = make(block, mlp, drop_path_rate=0.1, init_values=0.1)
    (model(images[:1]).mean() + 0.01 * balance_loss(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_mechanism(attention: str, block: str, images: Tensor) -> None:
    model = make(block, "mlp", attention)
    assert all(isinstance(b.attn, ATTENTION[attention]) for b in model.blocks)
    model(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_stock_checkpoint_gives_stock_logits(images: Tensor) -> None:
    stock = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    ours = make("prenorm", "mlp", "softmax").eval()
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(images), stock(images))


@pairs
def test_features(block: str, mlp: str, images: Tensor) -> None:
    model = make(block, mlp).eval()
    last, maps = model.forward_intermediates(images, norm=True)
    torch.testing.assert_close(last, model.forward_features(images))
    assert [m.shape for m in maps] == [(2, 48, 4, 4)] * 2
    torch.testing.assert_close(maps[-1].flatten(2).mT, last[:, 1:])
    choice = {"block_fn": BLOCKS[block], "mlp_layer": MLPS[mlp], "attn_layer": "ela_hadamard", "out_indices": [1]}
    backbone = timm.create_model("vit_tiny_patch16_224", **SMALL, **choice, features_only=True)
    assert [m.shape for m in backbone(images)] == [(2, 48, 4, 4)]


@pairs
def test_checkpointing_changes_nothing(block: str, mlp: str, images: Tensor) -> None:
    model = make(block, mlp)
    found = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        out = model(images)
        loss = balance_loss(model)
        (out.square().mean() + loss).backward()
        found.append((out, loss, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*found)


@pairs
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_torchscript(block: str, mlp: str, images: Tensor) -> None:
    model = make(block, mlp)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images), model(images))
    torch.testing.assert_close(scripted.eval()(images), model.eval()(images))


@pytest.mark.parametrize("attention", ["attn", "softmax"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_torchscript_with_and_without_a_grid(attention: str) -> None:
    block, x = PreNormBlock(48, 3, attn_layer=attention), torch.randn(1, 7, 48)
    torch.testing.assert_close(torch.jit.script(block)(x, grid=(2, 3)), block(x))


@pytest.mark.parametrize(("block", "mlp"), [("prenorm", "moe"), ("memory", "mlp"), ("memory-code", "moe-outer")])
def test_compiles_whole(block: str, mlp: str, images: Tensor) -> None:
    torch._dynamo.reset()
    model = make(block, mlp)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for form in (model, compiled):
        model.zero_grad()
        out = form(images)
        loss = balance_loss(form)
        (out.square().mean() + loss).backward()
        found.append((out, loss, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*found)


@pairs
def test_copies_and_states(block: str, mlp: str, images: Tensor) -> None:
    model, other = make(block, mlp), make(block, mlp)
    out = model(images)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(images), out)
    torch.testing.assert_close(copy.deepcopy(model)(images), out)


@pairs
def test_meta_device(block: str, mlp: str) -> None:
    model = make(block, mlp, device="meta")
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 5)
    assert set(model.state_dict()) == set(make(block, mlp).state_dict())


@pairs
def test_bfloat16(block: str, mlp: str, images: Tensor) -> None:
    model = make(block, mlp, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    out = model(images.bfloat16())
    assert out.dtype == torch.bfloat16
    out.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_rectangles_without_a_class_token() -> None:
    choice = {"block_fn": BLOCKS["memory"], "attn_layer": "ela_hadamard", "class_token": False, "global_pool": "avg"}
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "img_size": (32, 48)}, **choice)
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 5)


def test_the_paper_leaves_the_last_norm_out(images: Tensor) -> None:
    model = make("memory", "moe", final_norm=False)
    assert sum(isinstance(m, nn.LayerNorm) for m in model.modules()) == SMALL["depth"]
    assert sum(isinstance(m, MemoryLobe) for m in model.modules()) == SMALL["depth"]
    assert model(images).shape == (2, 5)
