import pickle
from typing import Any

import pytest
import torch
from torch import nn

from visionattn.attention import ATTENTION
from visionattn.detection import LAT, MODELS, WEIGHTS, YOLOLAT, Rep, load_detector
from visionattn.errors import ConfigError, UnknownNameError


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("grid", [(5, 7), (1, 1), (8, 4)])
def test_block_attends_over_the_map_with_its_kernel(name: str, grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = LAT(16, head_dim=8, attention=name).double().eval()
    block.proj, block.mlp = nn.Identity(), ZeroBranch()
    nn.init.zeros_(block.local.conv.weight)
    x = torch.randn(2, 16, *grid, dtype=torch.float64)
    parts = block.qkv(x).split(16, 1) * (3 // block.attention.streams)
    q, k, v = (part.flatten(2).unflatten(1, (2, 8)).transpose(-2, -1) for part in parts)
    expected = x + block.attention.reference(q, k, v).transpose(-2, -1).reshape(2, 16, *grid)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def test_local_part_sees_the_grid_and_not_its_transpose() -> None:
    torch.manual_seed(0)
    block = LAT(16, head_dim=8).eval()
    block.attention = ZeroBranch(16)
    block.mlp = ZeroBranch()
    x = torch.zeros(1, 16, 12, 12)
    x[..., 6, 2] = 1.0
    moved = (block(x) - x - (block(torch.zeros_like(x)))).abs().sum(1)[0]
    rows, columns = moved.gt(1e-7).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 8, 0, 4)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="head_dim=5"):
        LAT(16, head_dim=5)
    with pytest.raises(UnknownNameError, match="nearest: softmax"):
        LAT(16, head_dim=8, attention="sofmax")
    with pytest.raises(ConfigError, match=r"c=16.*32 channels"):
        LAT(16, head_dim=8)(torch.zeros(1, 32, 4, 4))
    with pytest.raises(ConfigError, match="neither attention nor kernel_size"):
        LAT(16, head_dim=8, attention=None, kernel_size=0)


def test_without_attention_the_local_part_remains() -> None:
    torch.manual_seed(0)
    block, alone = LAT(16, head_dim=8).eval(), LAT(16, head_dim=8, attention=None).eval()
    weights = block.state_dict()
    for name in ("qkv.conv.weight", "qkv.bn.weight", "qkv.bn.bias", "qkv.bn.running_mean", "qkv.bn.running_var"):
        weights[name] = weights[name][-16:]
    alone.load_state_dict(weights)
    block.attention = ZeroBranch(16)
    x = torch.randn(2, 16, 5, 7)
    torch.testing.assert_close(alone(x), block(x))


@pytest.mark.parametrize("options", [{}, {"attention": None}, {"kernel_size": 0}, {"attention": "softmax"}])
def test_it_scripts(options: dict[str, Any]) -> None:
    block, x = LAT(16, head_dim=8, **options).eval(), torch.randn(1, 16, 5, 7)
    torch.testing.assert_close(torch.jit.script(block)(x), block(x))


@torch.no_grad()
def test_a_block_from_before_an_option_computes_what_it_did() -> None:
    block, x = LAT(32, 16).eval(), torch.randn(2, 32, 5, 7)
    expected = block(x)
    for option in ("center_keys", "rotate_half"):
        delattr(block.attention, option)
    with pytest.raises(AttributeError):
        block(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(block))(x), expected)


@torch.no_grad()
def test_random_features_from_before_their_weights() -> None:
    block, x = LAT(32, 16, attention="performer").eval(), torch.randn(2, 32, 5, 7)
    expected = block(x)
    del block.attention.calibrated, block.attention.log_weights
    torch.testing.assert_close(pickle.loads(pickle.dumps(block))(x), expected)


@pytest.mark.parametrize("name", WEIGHTS)
def test_shipped_weights_run(name: str) -> None:
    network: Any = load_detector(name).model
    with torch.no_grad():
        assert network.float().eval()(torch.rand(1, 3, 64, 96))[0].isfinite().all()


class ZeroBranch(nn.Module):
    """Contributes nothing; ``width`` is that of the mixed values if it stands for an attention."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        return torch.zeros_like(x[..., : self.width] if self.width else x)


def test_neither_perceptron_nor_local_part() -> None:
    torch.manual_seed(0)
    block = LAT(16, head_dim=8, mlp_ratio=0, kernel_size=0).double().eval()
    nn.init.normal_(block.proj.bn.weight)
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    q, k, v = (part.flatten(2).unflatten(1, (2, 8)).transpose(-2, -1) for part in block.qkv(x).split(16, 1))
    mixed = block.attention.reference(q, k, v).transpose(-2, -1).reshape(2, 16, 5, 7)
    torch.testing.assert_close(block(x), x + block.proj(mixed), rtol=1e-10, atol=1e-10)
    assert {name.partition(".")[0] for name, _ in block.named_parameters()} == {"qkv", "proj"}


def test_rep_is_three_branches_and_one_after_fusing() -> None:
    torch.manual_seed(0)
    network = YOLOLAT(MODELS["yolo-lat-n"]).model  # for Ultralytics' fuse()
    block = Rep(12)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    network.model[1] = block.double().eval()
    x = torch.randn(2, 12, 9, 7, dtype=torch.float64)
    branches = block.conv1.bn(block.conv1.conv(x)), block.conv2.bn(block.conv2.conv(x)), block.bn(x)
    assert [conv.conv.kernel_size for conv in (block.conv1, block.conv2)] == [(3, 3), (1, 1)]
    expected = nn.functional.silu(sum(branches))
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)
    assert network.fuse(verbose=False).model[1] is block
    torch.testing.assert_close(block(x), expected, rtol=1e-6, atol=1e-6)  # Ultralytics adds up in float32
    assert sum(p.numel() for p in block.parameters()) == 12 * 12 * 9 + 12
