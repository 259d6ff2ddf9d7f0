import pytest
import torch
from torch import nn

from visionattn.attention import ATTENTION
from visionattn.detection import LAT
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


class ZeroBranch(nn.Module):
    """Contributes nothing; ``width`` is that of the mixed values if it stands for an attention."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        return torch.zeros_like(x[..., : self.width] if self.width else x)
