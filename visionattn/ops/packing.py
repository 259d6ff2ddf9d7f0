"""The packed projection taken apart, and its gradient put together without a copy where kernels wrote it in place."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def unpack(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of a packed projection, (B, N, 3 H D) to (B, H, N, D) each, as views."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():  # type: ignore[no-untyped-call, attr-defined]
        return views(x, heads)
    if torch.is_grad_enabled() and x.requires_grad:
        q, k, v = _Unpack.apply(x, heads)
        return q, k, v
    return quick_views(x, heads)


def transformed() -> bool:
    """Say whether torch.func or forward-mode differentiation is at work, which our operators know nothing of."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def packed_like(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for three tensors like q (B, H, N, D), the views of one packed projection."""
    B, H, N, D = q.shape
    return quick_views(q.new_empty(B, N, 3 * H * D), H)


def quick_views(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`views` does by three operators in place of ten: for eager mode, where each costs time."""
    B, N, width = x.shape
    q, k, v = x.view(B, N, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def views(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`unpack` does in the form that all exporters understand."""
    B, N, _ = x.shape
    q, k, v = [part.reshape(B, N, heads, -1).transpose(1, 2) for part in x.chunk(3, -1)]
    return q, k, v


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        return quick_views(x, heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True: the gradient shall have a gradient
            return torch.cat([part.transpose(1, 2).flatten(2) for part in gradients], -1), None
        whole = _whole(gradients)
        if whole is None:
            B, H, N, D = gradients[0].shape
            whole = gradients[0].new_empty(B, N, 3 * H * D)
            for place, part in zip(quick_views(whole, H), gradients, strict=True):
                place.copy_(part)
        return whole, None


def _whole(parts: tuple[Tensor, ...]) -> Tensor | None:
    """Return the packed projection that three tensors are the views of, or None."""
    q = parts[0]
    B, H, N, D = q.shape
    strides = 3 * N * H * D, D, 3 * H * D, 1
    for index, part in enumerate(parts):
        lies = part.stride() == strides and part.storage_offset() == q.storage_offset() + index * H * D
        if not lies or part.untyped_storage().data_ptr() != q.untyped_storage().data_ptr() or part.dtype != q.dtype:
            return None
    return q.as_strided((B, N, 3 * H * D), (3 * N * H * D, 3 * H * D, 1), q.storage_offset())
