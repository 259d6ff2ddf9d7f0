"""timm's block with the grid of the tokens."""

from typing import Any

import pytest
import timm.models.vision_transformer as vit
import torch
from torch import nn

from tests.blocks import by_hand
from visionattn.attention import ATTENTION
from visionattn.blocks import HyperLinkBlock, PreNormBlock
from visionattn.errors import UnknownNameError, UnsupportedError

DIM, HEADS = 24, 3
OPTIONS: list[dict[str, Any]] = [
    {},
    {"qkv_bias": True, "init_values": 0.1, "drop_path": 0.1, "mlp_ratio": 2.0, "act_layer": nn.SiLU},
    {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "proj_bias": False},
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Near(ATTENTION["ela_hadamard"]):
    """Attention that needs the grid."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, local=3, **kwargs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("attn_layer", ["attn", "softmax", vit.Attention, ATTENTION["softmax"]], ids=str)
def test_it_is_timms_block(attn_layer: Any, options: dict[str, Any]) -> None:
    stock = vit.Block(DIM, HEADS, **options).double().eval()
    ours = PreNormBlock(DIM, HEADS, attn_layer=attn_layer, **options).double().eval()
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(x, grid=(2, 3)), stock(x))
    torch.testing.assert_close(ours(x, is_causal=True), stock(x, is_causal=True))
    mask = torch.tensor([True] * 5 + [False] * 2).expand(2, 1, 1, 7)
    torch.testing.assert_close(ours(x, attn_mask=mask), stock(x, attn_mask=mask.expand(2, 1, 7, 7)))


def test_formula() -> None:
    block = PreNormBlock(DIM, HEADS, init_values=0.3, qkv_bias=True, attn_layer="ela_hadamard").double()
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    y = x + 0.3 * by_hand.attention(block.attn, by_hand.layer_norm(block.norm1, x))
    y = y + 0.3 * by_hand.mlp(block.mlp, by_hand.layer_norm(block.norm2, y))
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("cls", [PreNormBlock, HyperLinkBlock])
def test_the_grid_reaches_the_attention(cls: type[PreNormBlock]) -> None:
    block = cls(DIM, HEADS, attn_layer=Near).double()
    x = torch.randn(1, 7, DIM, dtype=torch.float64)  # one prefix token
    assert not torch.allclose(block(x, grid=(2, 3)), block(x, grid=(3, 2)))
    # Without weights for the neighbours above and below, a row of the grid does not feel the other one.
    nn.init.zeros_(block.attn.local.weight[:, :, ::2])
    nn.init.zeros_(block.attn.local.weight[:, :, :, ::2])
    torch.testing.assert_close(block(x, grid=(2, 3)), block(x, grid=(3, 2)))
    with pytest.raises(UnsupportedError, match="grid"):
        block(x)


@pytest.mark.parametrize("cls", [PreNormBlock, HyperLinkBlock])
def test_attention_by_name(cls: type[PreNormBlock]) -> None:
    for name, attention in ATTENTION.items():
        assert isinstance(cls(DIM, HEADS, attn_layer=name).attn, attention)
    assert isinstance(cls(DIM, HEADS, attn_layer="diff").attn, vit.DiffAttention)
    assert isinstance(cls(DIM, HEADS).attn, vit.Attention)
    with pytest.raises(UnknownNameError, match=r"unknown attention 'ela_hadamrad'; accepted: .*nearest: ela_hadamard"):
        cls(DIM, HEADS, attn_layer="ela_hadamrad")
