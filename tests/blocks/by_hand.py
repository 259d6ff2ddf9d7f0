"""Parts of a block written out from their formulas, with nothing of the package and no module of PyTorch."""

import torch
from torch import Tensor, nn


def linear(module: nn.Module, x: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, module.weight)
    return y if module.bias is None else y + module.bias


def layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    hidden = linear(module.fc1, x)
    return linear(module.fc2, hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))


def hadamard(qkv: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """Attention by ``sum_d exp(q_d) exp(k_d)`` over packed projections, (B, N, 3 C) to (B, N, C)."""
    B, N, _ = qkv.shape
    q, k, v = (part.reshape(B, N, heads, -1) for part in qkv.chunk(3, -1))
    kernel = torch.einsum("bihd,bjhd->bhij", q.exp(), k.exp())
    if allowed is not None:
        kernel = kernel * allowed
    return torch.einsum("bhij,bjhe->bihe", kernel / kernel.sum(-1, keepdim=True), v).flatten(2)


def attention(module: nn.Module, x: Tensor) -> Tensor:
    return linear(module.proj, hadamard(linear(module.qkv, x), module.num_heads))
