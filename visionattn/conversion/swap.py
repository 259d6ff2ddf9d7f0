"""Attention modules of timm in a model: which there are, why one cannot be converted, and ours in their place."""

from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from visionattn.attention import ATTENTION, Attention, attention_layer
from visionattn.conversion.grid import tell_grid
from visionattn.errors import ConfigError

Layers = dict[str, dict[str, Any]]
"""Path of a module in the model -> ``{"name": mechanism, option: value, ...}``: all that rebuilding needs."""

_KNOWN: tuple[type[nn.Module], ...] = (
    timm.layers.Attention,
    timm.layers.AttentionRope,
    EvaAttention,
    ATTENTION["softmax"],
)


@dataclass(frozen=True)
class Found:
    """The attention modules of a model.

    Attributes:
        convertible: path -> module, in the order of the model.
        refused: path -> why it stays as it is.
    """

    convertible: dict[str, Any]
    refused: dict[str, str]


def find(model: nn.Module) -> Found:
    """Look for attention modules in a model.

    Raises:
        ConfigError: none can be converted; the reasons are named.
    """
    convertible, refused = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, _KNOWN):
            reason = _refusal(module)
            if reason:
                refused[path] = reason
            else:
                convertible[path] = module
        elif "attention" in type(module).__name__.lower() and not any(path.startswith(f"{p}.") for p in refused):
            refused[path] = _foreign(module)
    if not convertible:
        reasons = "\n".join(f"  {path or 'the model itself'}: {reason}" for path, reason in list(refused.items())[:10])
        raise ConfigError(
            f"{type(model).__name__} has no attention that can be converted"
            + (f":\n{reasons}\n" if reasons else "; ")
            + "give a model whose blocks hold timm.layers.Attention, AttentionRope or EvaAttention"
        )
    return Found(convertible, refused)


def rebuild(model: nn.Module, layers: Layers) -> nn.Module:
    """Put ours in the place of timm's modules, in the model itself, with their weights, and note it on the model.

    Args:
        model: with the modules that ``layers`` names.
        layers: kept as the model's attribute ``attention_layers``; a file holds them, to build the model again.

    Raises:
        ConfigError: the model has no such module, or an option is unknown.
    """
    for path, spec in layers.items():
        parent, _, name = path.rpartition(".")
        try:
            owner, old = model.get_submodule(parent), model.get_submodule(path)
        except AttributeError as error:
            raise ConfigError(f"{type(model).__name__} has no attention {path!r} to put another in place of") from error
        setattr(owner, name, transplant(old, spec))
    if any(spec.get("local") for spec in layers.values()):
        tell_grid(model, [model.get_submodule(path) for path in layers])
    model.attention_layers = layers  # type: ignore[assignment]
    return model


def transplant(old: Any, spec: dict[str, Any]) -> Attention:
    """Return the attention that ``spec`` describes, with the weights of one of timm's; what it adds has no effect."""
    options = {key: value for key, value in spec.items() if key not in ("name", "qkv_bias")}
    weight, bias = _projection(old)
    bias = torch.zeros_like(weight[:, 0]) if bias is None and spec.get("qkv_bias") else bias
    cls = attention_layer(spec["name"], rotate_half=getattr(old, "rotate_half", False), **options)
    new: Any = cls(
        weight.shape[1],
        old.num_heads,
        qkv_bias=bias is not None,
        attn_drop=old.attn_drop.p,
        device=weight.device,
        dtype=weight.dtype,
    )
    if new.streams != 3:
        raise ConfigError(f"{spec['name']} has no queries, keys and values, so it cannot take those of {type(old)}")
    with torch.no_grad():
        new.qkv.weight.copy_(weight)
        if bias is not None:
            new.qkv.bias.copy_(bias)
        if new.local is not None:
            nn.init.zeros_(new.local.weight)
            nn.init.zeros_(new.local.bias)
    new.qkv.requires_grad_(weight.requires_grad)
    for name in ("q_norm", "k_norm", "norm", "proj", "proj_drop"):
        setattr(new, name, getattr(old, name))
    new.train(old.training)
    return new


def _refusal(module: Any) -> str | None:
    """Say why one of timm's modules that are known cannot be converted, or return None."""
    if type(module) not in _KNOWN:
        return f"{type(module).__name__} changes {type(module).__mro__[1].__name__} in a way that is not known here"
    if getattr(module, "local", None) is not None:
        return "it has a local convolution already"
    if getattr(module, "gate", None) is not None:
        return "its output has a gate, which ours have not"
    width = module.num_heads * module.head_dim
    source = module.qkv if module.qkv is not None else module.q_proj
    if isinstance(source, nn.Identity):
        return "its caller projects the tokens"
    if source.in_features != width or module.proj.out_features != width:
        sizes = f"{source.in_features} channels in, {width} in all heads, {module.proj.out_features} out"
        return f"it has {sizes}; in ours these are one number"
    return None


def _foreign(module: nn.Module) -> str:
    """Say why a module that calls itself an attention is none that can be converted."""
    name = type(module).__name__
    parts = {part for part, _ in module.named_parameters()} | {part for part, _ in module.named_buffers()}
    if "pool" in name.lower():
        return f"{name} pools all tokens by few queries, whose cost is linear already"
    if any("rel" in part and ("pos" in part or "bias" in part) for part in parts):
        return f"{name} adds a bias of relative positions to the N x N matrix, which a linear attention never forms"
    if "window" in name.lower():
        return f"{name} attends within windows, whose cost is linear already"
    return f"{name} is neither timm.layers.Attention nor AttentionRope nor EvaAttention"


def _projection(old: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of the packed projection of queries, keys and values."""
    if old.qkv is not None:
        if getattr(old, "q_bias", None) is None:
            return old.qkv.weight, old.qkv.bias
        return old.qkv.weight, torch.cat((old.q_bias, old.k_bias, old.v_bias))
    parts = (old.q_proj, old.k_proj, old.v_proj)
    rows = [_per_head(part.weight, old) for part in parts]
    if all(part.bias is None for part in parts):
        return torch.cat(rows), None
    empty = torch.zeros_like(rows[0][:, 0])
    return torch.cat(rows), torch.cat([empty if p.bias is None else _per_head(p.bias, old) for p in parts])


def _per_head(x: Tensor, old: Any) -> Tensor:
    """Repeat what several heads share, so that each has its own."""
    heads = x.reshape(-1, old.head_dim, *x.shape[1:])
    return heads.repeat_interleave(old.num_heads // len(heads), 0).flatten(0, 1)
