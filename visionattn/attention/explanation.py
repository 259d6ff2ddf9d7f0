"""Which path the attention of a model takes, fused kernels or eager formulas, and why."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from visionattn.attention.base import Attention
from visionattn.attention.registry import ATTENTION
from visionattn.attention.softmax import SoftmaxAttention
from visionattn.errors import ConfigError
from visionattn.ops import switch

PYTORCH = "scaled_dot_product_attention of PyTorch"


class Layer(NamedTuple):
    """The path of one layer.

    Attributes:
        name: in the model, as ``named_modules`` has it.
        mechanism: name in the registry, or of the class.
        path: ``fused``, ``eager``; ``pytorch`` of softmax attention; ``not called``.
        reason: why no fused kernel is taken; empty where one is.
    """

    name: str
    mechanism: str
    path: str
    reason: str


class Explanation(list[Layer]):
    """The paths of a model's layers, in the order of the model; printed as a table."""

    def __str__(self) -> str:
        """Return a table, one line a layer."""
        rows = [Layer("layer", "mechanism", "path", "why"), *self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row.reason]).rstrip()
            for row in rows
        )


def explain(model: nn.Module, *inputs: Any, **options: Any) -> Explanation:
    """Run a model once, without gradients, and tell for each attention layer which path it takes and why.

    A compiled model takes the same paths as the model that was compiled; it is that one which runs here.

    Args:
        model: with attention layers of this package.
        *inputs: what the model is called with: of the shape, type and device that count.
        **options: further arguments of the call.

    Returns:
        A layer a row: name, mechanism, path and reason.

    Raises:
        ConfigError: the model has no attention layer of this package.

    Example:
        >>> import timm, torch, visionattn
        >>> model = timm.create_model("vit_tiny_patch16_224", attn_layer="ela_hadamard", depth=1)
        >>> print(visionattn.explain(model, torch.randn(1, 3, 224, 224)))
        layer          mechanism     path   why
        blocks.0.attn  ela_hadamard  eager  the inputs are on cpu, and kernels run on cuda
    """
    model = getattr(model, "_orig_mod", model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if not layers:
        raise ConfigError(
            f"explain: got a {type(model).__name__} without attention of this package; give a model that has some, "
            'such as timm.create_model("vit_tiny_patch16_224", attn_layer="ela_hadamard")'
        )
    told: dict[int, tuple[str, str]] = {}
    with torch.no_grad(), _listening(list(layers.values()), told):
        model(*inputs, **options)
    return Explanation(
        Layer(name, _mechanism(layer), *told.get(id(layer), ("not called", ""))) for name, layer in layers.items()
    )


@contextmanager
def _listening(layers: list[Attention], told: dict[int, tuple[str, str]]) -> Iterator[None]:
    """Note what each layer chooses while it runs."""
    running: list[Attention] = []

    def enter(layer: nn.Module, _: Any) -> None:
        assert isinstance(layer, Attention)
        running.append(layer)
        told[id(layer)] = ("pytorch", PYTORCH) if isinstance(layer, SoftmaxAttention) else ("eager", "it has no kernel")

    def leave(*_: Any) -> None:
        running.pop()

    def note(fused: bool, reason: str) -> None:
        if running:
            told[id(running[-1])] = ("fused", "") if fused else ("eager", reason)

    handles = [
        *(layer.register_forward_pre_hook(enter) for layer in layers),
        *(layer.register_forward_hook(leave, always_call=True) for layer in layers),
    ]
    switch.listeners.append(note)
    try:
        yield
    finally:
        switch.listeners.remove(note)
        for handle in handles:
            handle.remove()


def _mechanism(layer: Attention) -> str:
    names = [name for name, made in ATTENTION.items() if type(layer) is made]
    return names[0] if names else type(layer).__name__
