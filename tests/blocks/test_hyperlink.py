"""ELA's layer with one norm and one residual, and the lobe on what it adds."""

from typing import Any

import pytest
import timm.models.vision_transformer as vit
import torch
from torch import Tensor, nn

from tests.blocks import by_hand
from visionattn.attention import ATTENTION
from visionattn.blocks import HyperLinkBlock, MemoryLobe
from visionattn.errors import UnsupportedError

DIM, HEADS, TOKENS = 24, 3, 7
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, TOKENS, DIM, dtype=torch.float64)


def make(**options: Any) -> HyperLinkBlock:
    return HyperLinkBlock(DIM, HEADS, attn_layer="ela_hadamard", **options).double()


class TestBlock:
    @pytest.mark.parametrize("ffn_residual", [False, True])
    @pytest.mark.parametrize("memory", [False, True])
    def test_formula(self, x: Tensor, memory: bool, ffn_residual: bool) -> None:
        block = make(qkv_bias=True, init_values=0.3, memory=memory, ffn_residual=ffn_residual)
        h = by_hand.attention(block.attn, by_hand.layer_norm(block.norm1, x))
        added = by_hand.mlp(block.mlp, h)
        if ffn_residual:
            added = h + added
        if memory:
            added = added + by_hand.hadamard(added @ block.memory.qkv.weight.T, heads=1)
        torch.testing.assert_close(block(x), x + 0.3 * added)

    def test_one_norm_and_timms_names(self) -> None:
        ours, stock = set(make(init_values=0.1).state_dict()), set(vit.Block(DIM, HEADS, init_values=0.1).state_dict())
        assert stock - ours == {"norm2.weight", "norm2.bias", "ls1.gamma"}
        assert ours < stock
        assert set(make(memory=True).state_dict()) - stock == {"memory.qkv.weight"}

    def test_stochastic_depth_drops_the_whole_layer(self, x: Tensor) -> None:
        block = make(drop_path=0.5, memory=True)
        x = x.repeat(8, 1, 1)
        moved = (block(x) - x).abs().amax((1, 2)) > 0
        assert 0 < moved.sum() < len(x)
        whole = x + 2 * (block.eval()(x) - x)
        torch.manual_seed(1)
        out = block.train()(x)
        for i in range(len(x)):
            torch.testing.assert_close(out[i], whole[i] if not torch.equal(out[i], x[i]) else x[i])

    def test_permuting_tokens_permutes_the_output(self, x: Tensor) -> None:
        block, order = make(memory=True), torch.randperm(TOKENS)
        torch.testing.assert_close(block(x[:, order]), block(x)[:, order])

    def test_padding_is_ignored(self, x: Tensor) -> None:
        block = make(memory=True)
        keep = torch.arange(TOKENS) < 4
        out = block(x, attn_mask=keep.expand(2, 1, 1, TOKENS))
        torch.testing.assert_close(out[:, :4], block(x[:, :4]))
        assert not torch.allclose(out[:, :4], block(x)[:, :4])

    def test_causal(self, x: Tensor) -> None:
        block = make(memory=True, causal_memory=True)
        longer = torch.cat([x, torch.randn_like(x)], 1)
        torch.testing.assert_close(block(longer, is_causal=True)[:, :TOKENS], block(x, is_causal=True))
        assert not torch.allclose(block(longer)[:, :TOKENS], block(x))  # the attention sees all

    def test_a_lobe_that_sees_the_target_is_refused(self, x: Tensor) -> None:
        with pytest.raises(UnsupportedError, match="would read the target, the tokens to come; use a causal one"):
            make(memory=True)(x, is_causal=True)


class TestLobe:
    @pytest.mark.parametrize("causal", [False, True])
    def test_formula(self, x: Tensor, causal: bool) -> None:
        lobe = MemoryLobe(DIM, causal=causal).double()
        wq, wk, wv = lobe.qkv.weight.chunk(3)
        q, k, v = (x @ w.T for w in (wq, wk, wv))
        kernel = sum(torch.exp(q[:, :, None, d] + k[:, None, :, d]) for d in range(DIM))
        kernel = kernel * CAUSAL if causal else kernel
        expected = (kernel / kernel.sum(-1, keepdim=True)) @ v
        torch.testing.assert_close(lobe(x), expected)
        reference = ATTENTION["ela_hadamard"](DIM, 1, projections=False).reference
        torch.testing.assert_close(expected, reference(q[:, None], k[:, None], v[:, None], is_causal=causal)[:, 0])

    def test_three_square_matrices(self) -> None:
        assert {name: p.shape for name, p in MemoryLobe(DIM).named_parameters()} == {"qkv.weight": (3 * DIM, DIM)}

    @pytest.mark.parametrize("causal", [False, True])
    def test_padding(self, x: Tensor, causal: bool) -> None:
        lobe = MemoryLobe(DIM, causal=causal).double()
        keep = torch.arange(TOKENS) != 2
        out = lobe(x, attn_mask=keep.expand(2, 1, 1, TOKENS))
        torch.testing.assert_close(out[:, keep], lobe(x[:, keep]))
        allowed = (CAUSAL & keep) if causal else keep.expand(TOKENS, TOKENS)
        torch.testing.assert_close(out, by_hand.hadamard(lobe.qkv(x), 1, allowed))

    def test_a_causal_lobe_is_causal_in_every_call(self, x: Tensor) -> None:
        lobe = MemoryLobe(DIM, causal=True).double()
        torch.testing.assert_close(lobe(x), lobe(x, is_causal=True))
        changed = torch.cat([x[:, :-1], torch.randn_like(x[:, :1])], 1)
        torch.testing.assert_close(lobe(changed)[:, :-1], lobe(x)[:, :-1])

    def test_the_bidirectional_lobe_sees_tokens_to_come(self, x: Tensor) -> None:
        lobe = MemoryLobe(DIM).double()
        changed = torch.cat([x[:, :-1], torch.randn_like(x[:, :1])], 1)
        assert not torch.allclose(lobe(changed)[:, 0], lobe(x)[:, 0])
        with pytest.raises(UnsupportedError, match="got is_causal=True, but this lobe is bidirectional"):
            lobe(x, is_causal=True)

    def test_a_mask_by_query_is_refused(self, x: Tensor) -> None:
        with pytest.raises(UnsupportedError, match="padding mask"):
            MemoryLobe(DIM).double()(x, attn_mask=CAUSAL)

    def test_gradients(self) -> None:
        lobe = MemoryLobe(4).double()
        x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lobe, (x,))

    def test_large_inputs_stay_finite(self, x: Tensor) -> None:
        lobe = MemoryLobe(DIM)
        nn.init.normal_(lobe.qkv.weight, std=20)
        assert lobe(x.float()).isfinite().all()
