"""Mixture of experts: its formulas, its balance loss, and what becomes of the module."""

import copy
import pickle
from typing import Any

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from tests.blocks import by_hand
from visionattn.blocks import MoEMlp, balance_loss
from visionattn.errors import ConfigError

DIM, HIDDEN = 8, 12


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 11, DIM, dtype=torch.float64)


def make(**options: Any) -> MoEMlp:
    moe = MoEMlp(DIM, HIDDEN, **options).double()
    nn.init.normal_(moe.router.weight)  # decided: no two probabilities are close
    nn.init.normal_(moe.router.bias)
    return moe


def token_by_token(moe: MoEMlp, x: Tensor, top_k: int, score_bias: str) -> Tensor:
    """The formulas of the paper, a token and an expert at a time."""
    outputs = []
    for token in x.flatten(0, 1):
        p = torch.exp(by_hand.linear(moe.router, token))
        p = p / p.sum()
        best = sorted(range(len(p)), key=lambda e, p=p: -p[e].item())[:top_k]
        y = torch.zeros(DIM, dtype=torch.float64)
        for e in best:
            S, B = p[e] / sum(p[b] for b in best), moe.router.weight[e]
            ffn = by_hand.mlp(moe.experts[e], token)
            y = y + {"none": S * ffn, "outer": S * ffn + B, "inner": S * (ffn + B)}[score_bias]
        outputs.append(y)
    return torch.stack(outputs).view_as(x)


@pytest.mark.parametrize("score_bias", ["none", "outer", "inner"])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (3, 1), (3, 3), (1, 1)])
class TestFormula:
    def test_output(self, x: Tensor, experts: int, top_k: int, score_bias: str) -> None:
        moe = make(experts=experts, top_k=top_k, score_bias=score_bias)
        torch.testing.assert_close(moe(x), token_by_token(moe, x, top_k, score_bias))

    def test_gradients(self, x: Tensor, experts: int, top_k: int, score_bias: str) -> None:
        moe = make(experts=experts, top_k=top_k, score_bias=score_bias)
        leaves = [*moe.parameters()]
        weights = torch.randn_like(x)
        ours = torch.autograd.grad((moe(x) * weights).sum(), leaves)
        truth = torch.autograd.grad(
            (token_by_token(moe, x, top_k, score_bias) * weights).sum(), leaves, materialize_grads=True
        )
        torch.testing.assert_close(ours, truth)


def test_all_experts_make_the_plain_softmax_mixture(x: Tensor) -> None:
    moe = make(experts=3, top_k=3)
    mixture = torch.stack([expert(x) for expert in moe.experts], -1) * moe.router(x).softmax(-1).unsqueeze(-2)
    torch.testing.assert_close(moe(x), mixture.sum(-1))


def test_equal_experts_are_one_mlp(x: Tensor) -> None:
    moe = make(experts=4, top_k=2)
    for expert in moe.experts:
        expert.load_state_dict(moe.experts[0].state_dict())
    torch.testing.assert_close(moe(x), moe.experts[0](x))


def test_each_token_is_its_own_affair(x: Tensor) -> None:
    moe, order = make(), torch.randperm(x.shape[1])
    torch.testing.assert_close(moe(x[:, order]), moe(x)[:, order])
    torch.testing.assert_close(moe(x[0, 3]), moe(x)[0, 3])


def test_experts_are_timms_mlp() -> None:
    options = {"out_features": 5, "act_layer": nn.SiLU, "norm_layer": nn.LayerNorm, "bias": False, "drop": 0.25}
    moe, mlp = MoEMlp(DIM, HIDDEN, experts=3, **options), Mlp(DIM, HIDDEN, **options)
    assert [str(expert) for expert in moe.experts] == [str(mlp)] * 3
    assert [p.shape for p in moe.experts.parameters()] == [p.shape for p in mlp.parameters()] * 3
    assert moe(torch.randn(2, DIM)).shape == (2, 5)


@pytest.mark.parametrize(("score_bias", "learns"), [("none", False), ("inner", True), ("outer", True)])
def test_the_router_of_one_expert_a_token(x: Tensor, score_bias: str, learns: bool) -> None:
    moe = make(top_k=1, score_bias=score_bias)
    moe(x).square().sum().backward()
    assert (moe.router.weight.grad.abs().max() > 1e-9) == learns


class TestBalance:
    def test_even_is_one(self) -> None:
        moe = MoEMlp(4, experts=4, top_k=1)
        nn.init.eye_(moe.router.weight)
        nn.init.zeros_(moe.router.bias)
        moe(50 * torch.eye(4).repeat(3, 1, 1))  # each expert is sure of a quarter of the tokens
        assert moe.balance.item() == pytest.approx(1)
        nn.init.zeros_(moe.router.weight)  # nobody is sure of anything
        moe(torch.randn(5, 4))
        assert moe.balance.item() == pytest.approx(1)

    @pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (6, 3), (3, 3)])
    def test_all_tokens_to_the_same_experts(self, experts: int, top_k: int) -> None:
        moe = MoEMlp(4, experts=experts, top_k=top_k)
        nn.init.zeros_(moe.router.weight)
        moe.router.bias.data = torch.where(torch.arange(experts) < top_k, 50.0, 0.0)
        moe(torch.randn(5, 4))
        assert moe.balance.item() == pytest.approx(experts / top_k)

    def test_sure_routers_are_never_below_one(self) -> None:
        moe = MoEMlp(4, experts=4, top_k=1)
        nn.init.eye_(moe.router.weight)
        nn.init.zeros_(moe.router.bias)
        for _ in range(20):
            share = torch.randint(4, (16,)).bincount(minlength=4)
            moe(50 * torch.eye(4).repeat_interleave(share, 0))
            # f = g here, and 4 sum f^2 = 1 + 4 sum (f - 1/4)^2
            assert moe.balance.item() == pytest.approx(1 + 4 * (share / 16 - 0.25).square().sum().item())

    def test_formula(self, x: Tensor) -> None:
        moe = make(experts=5, top_k=2)
        moe(x)
        p = moe.router(x).flatten(0, 1).softmax(-1)
        f = torch.zeros(5, dtype=torch.float64)
        for row in p:
            for e in sorted(range(5), key=lambda e, row=row: -row[e].item())[:2]:
                f[e] += 1 / (2 * len(p))
        torch.testing.assert_close(moe.balance, 5 * sum(f[e] * p[:, e].mean() for e in range(5)))

    def test_gradient(self, x: Tensor) -> None:
        moe = make()

        def loss() -> Tensor:
            moe(x)
            return balance_loss(moe)

        loss().backward()
        weight, step = moe.router.weight.data, 1e-6
        numeric = torch.zeros_like(weight)
        for index in torch.cartesian_prod(*map(torch.arange, weight.shape)):
            for sign in (1, -1):
                weight[*index] += sign * step
                numeric[*index] += sign * loss().item() / (2 * step)
                weight[*index] -= sign * step
        torch.testing.assert_close(moe.router.weight.grad, numeric, rtol=1e-6, atol=1e-8)
        assert all(p.grad is None for p in moe.experts.parameters())

    def test_descending_it_balances(self, x: Tensor) -> None:
        moe = make(experts=4, top_k=2)
        moe.router.bias.data += torch.tensor([9.0, 9.0, 0.0, 0.0])
        optimizer = torch.optim.SGD(moe.router.parameters(), lr=2)
        losses = []
        for _ in range(200):
            optimizer.zero_grad()
            moe(x)
            balance_loss(moe).backward()
            optimizer.step()
            losses.append(balance_loss(moe).item())
        assert losses[0] > 1.8
        assert losses[-1] < 1.05

    def test_sum_over_a_model(self, x: Tensor) -> None:
        model = nn.Sequential(make(experts=4), nn.GELU(), make(experts=3))
        model(x)
        torch.testing.assert_close(balance_loss(model), model[0].balance + model[2].balance)

    def test_nothing_to_balance(self, x: Tensor) -> None:
        assert balance_loss(nn.Linear(2, 2)).item() == 0
        moe = make().eval()
        moe(x)
        assert balance_loss(moe).item() == 0

    def test_scoring_leaves_the_training_loss(self, x: Tensor) -> None:
        moe = make()
        moe(x)
        before = moe.balance
        moe.eval()(2 * x)
        assert moe.balance is before


class TestModule:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda moe: pickle.loads(pickle.dumps(moe))])
    def test_copies_amid_training(self, x: Tensor, duplicate: Any) -> None:
        moe = make()
        out = moe(x)
        twin = duplicate(moe)
        assert twin.balance is None
        assert moe.balance is not None
        torch.testing.assert_close(twin(x), out)

    def test_state_dict(self, x: Tensor) -> None:
        moe, other = make(score_bias="inner"), make(score_bias="inner")
        moe(x)
        other.load_state_dict(moe.state_dict())
        torch.testing.assert_close(other(x), moe(x))
        assert set(moe.state_dict()) == {name for name, _ in moe.named_parameters()}

    @pytest.mark.parametrize("score_bias", ["none", "outer", "inner"])
    def test_bfloat16(self, x: Tensor, score_bias: str) -> None:
        moe = make(experts=4, top_k=4, score_bias=score_bias).bfloat16()  # all: a near tie may fall either way
        out = moe(x.bfloat16())
        assert out.dtype == torch.bfloat16
        assert moe.balance.dtype == torch.float32
        truth = copy.deepcopy(moe).double()(x.bfloat16().double())
        assert (out.double() - truth).norm() < 0.02 * truth.norm()

    def test_autocast(self, x: Tensor) -> None:
        moe = make(experts=4, top_k=4, score_bias="inner").float()
        with torch.autocast("cpu", torch.bfloat16):
            out = moe(x.float())
            (out.square().mean() + balance_loss(moe)).backward()
        assert (out - moe(x.float())).norm() < 0.03 * out.norm()
        assert all(p.grad.isfinite().all() for p in moe.parameters())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"top_k": 0}, "top_k=0 with experts=4; choose"),
            ({"top_k": 3, "experts": 2}, "top_k=3 with experts=2; choose"),
            ({"score_bias": "inn"}, "score_bias: got 'inn'; accepted: inner, none, outer; nearest: inner"),
            ({"score_bias": "outer", "out_features": 5}, "width 8 to an output of width 5; make them equal"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            MoEMlp(DIM, HIDDEN, **options)
