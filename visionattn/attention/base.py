"""The contract that every mechanism keeps: timm's constructor, timm's parameter names, timm's forward."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.errors import ConfigError, UnsupportedError
from visionattn.ops.packing import unpack, views
from visionattn.ops.precision import outcast, widen
from visionattn.ops.rotation import rotate


class Attention(nn.Module):
    """Multi-head self-attention with the projections of ``timm.layers.Attention``; a subclass says how tokens mix.

    Input and output are (B, N, dim). Parameters are named as timm names them (``qkv``, ``proj``, ``q_norm``,
    ``k_norm``, ``norm``), so a checkpoint of either loads into the other.

    A subclass gives :meth:`attend` (fast), :meth:`advance` (one token at a time) and :meth:`log_kernel` (the truth), or
    :meth:`reference` where the weights are not those of one kernel.

    Args:
        dim: width C of a token.
        num_heads: heads H; must divide ``dim``.
        qkv_bias: bias in the query, key and value projections.
        qk_norm: normalise queries and keys per head by ``norm_layer``.
        scale_norm: normalise the mixed values by ``norm_layer`` before the output projection.
        proj_bias: bias in the output projection.
        attn_drop: probability of dropping an attention weight; only where the N x N matrix exists.
        proj_drop: dropout after the output projection.
        norm_layer: constructor called with a width; needed by ``qk_norm`` and ``scale_norm``.
        device: where parameters are made.
        dtype: their type.
        projections: False where the caller projects by itself (a convolution with folded normalisation, say): the
            input is then the packed projection (B, N, ``streams`` x dim), and the output the mixed values (B, N, dim).
        local: side of a depthwise convolution over the values, added to the mixed values; odd, 0 for none. It needs the
            grid of the tokens in every call.
        center_keys: subtract the mean key of each image from its keys, so that what all keys share is not read by the
            kernel. Softmax attention does not change by it, nor does what ``performer`` and ``dark`` estimate, whose
            estimate gets better; other kernels change. Not with ``is_causal``, where later tokens would be seen.
        rotate_half: the layout of ``rope`` in forward: pair channel d with d + head_dim / 2, rather than neighbours.

    Raises:
        ConfigError: ``num_heads`` does not divide ``dim``, a normalisation lacks its ``norm_layer``, or ``local`` is
            even.
    """

    streams = 3
    """How many projections of a token the mechanism takes: queries, keys and values."""

    random = False
    """Whether :meth:`log_kernel` is an estimate, by random features, of :meth:`log_target`."""

    positional = False
    """Whether the kernel depends on where tokens stand, not on their content alone."""

    ordered = True
    """Whether there is a causal form; otherwise ``is_causal`` and :meth:`step` are refused."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        projections: bool = True,
        local: int = 0,
        center_keys: bool = False,
        rotate_half: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"dim={dim} is not divisible by num_heads={num_heads}; choose heads that divide it")
        if local < 0 or (local and local % 2 == 0):
            raise ConfigError(f"local={local}; give an odd side, or 0 for no convolution")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.center_keys, self.rotate_half = center_keys, rotate_half
        self.qkv = self._input_projection(qkv_bias, factory) if projections else nn.Identity()
        self.q_norm = _norm(norm_layer, self.head_dim, factory) if qk_norm else nn.Identity()
        self.k_norm = _norm(norm_layer, self.head_dim, factory) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.local = nn.Conv2d(dim, dim, local, padding=local // 2, groups=dim, **factory) if local else None
        self.norm = _norm(norm_layer, dim, factory) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory) if projections else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the content of a pickled module, which may be older than some options."""
        super().__setstate__({"center_keys": False, "rotate_half": False} | state)  # type: ignore[no-untyped-call]

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: tuple[int, int] | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Attend over the tokens of ``x``.

        Args:
            x: tokens, (B, N, dim).
            attn_mask: boolean, True where a key takes part, broadcastable to (B, heads, 1, N): a padding mask. Softmax
                attention takes any mask of ``scaled_dot_product_attention``. A query without any key gets zeros.
            is_causal: token i attends to tokens 0..i.
            grid: (H, W) of the last H x W tokens; those before are prefix tokens. Needed by ``local`` and by kernels
                of two-dimensional positions, ignored by all others.
            rope: rotary positions of the last tokens, as timm makes them, (tokens, 2 head_dim): queries and keys are
                turned by them before the kernel is taken. Tokens before are prefix tokens, which are not turned.

        Raises:
            UnsupportedError: the mechanism does not offer what is asked.
        """
        x = self.qkv(x)
        placed = rope is not None or self.center_keys
        if not torch.jit.is_scripting() and not is_causal and not placed:  # type: ignore[attr-defined]
            packed = self.attend_packed(x, attn_mask)
            if packed is not None:
                return self.proj_drop(self.proj(self.norm(packed)))
        q, k, v = self.split(x)
        if placed:
            q, k = self.place(q, k, rope, attn_mask, is_causal)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            mixed = self.attend(q, k, v, attn_mask, is_causal, grid)
        else:
            with _full_precision(x):
                mixed = self.attend(q, k, v, attn_mask, is_causal, grid)
        if self.local is not None:
            if is_causal:
                raise UnsupportedError("local convolutions see tokens to come; use local=0 where is_causal=True")
            mixed = mixed + self.convolve(outcast(v, key_mask(attn_mask)), grid)
        return self.finish(mixed)

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Attend from one more token to itself and all before it: the causal form, a token at a time.

        Args:
            x: the next token, (B, 1, dim).
            state: what the last step returned; None at the first token.

        Returns:
            The token's output, (B, 1, dim), and the state for the next step.

        Raises:
            UnsupportedError: ``x`` is not one token, the module has a ``local`` convolution or ``center_keys``, or the
                mechanism has no causal form.
        """
        if x.dim() != 3 or x.shape[1] != 1:
            raise UnsupportedError(f"step: got {tuple(x.shape)}; give one token, (B, 1, {self.dim}), after another")
        if self.local is not None or self.center_keys:
            raise UnsupportedError("step: local and center_keys see tokens to come; use local=0, center_keys=False")
        if not self.ordered:
            refuse_order()
        q, k, v = self.project(x)
        with _full_precision(x):
            mixed, state = self.advance(q, k, v, state)
        return self.finish(mixed), state

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """:meth:`attend` through the explicit N x N matrix: the truth that tests and reports compare with."""
        return softmax_over(self.log_kernel(q, k), attn_mask, is_causal) @ v

    def target(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        """Attention by the exact kernel that random features estimate; without such features, the reference."""
        if not self.random:
            return self.reference(q, k, v, is_causal=is_causal)
        return softmax_over(self.log_target(q, k), None, is_causal) @ v

    def extra_repr(self) -> str:
        """Show the options in ``repr``."""
        plain = {key: value for key, value in vars(self).items() if isinstance(value, str | int | float)}
        return ", ".join(f"{key}={value!r}" for key, value in plain.items() if key != "training" and key[0] != "_")

    def log_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """Logarithm of the kernel of all pairs, (B, H, N, D) twice to (B, H, N, N), up to a constant a query."""
        raise NotImplementedError

    def log_target(self, q: Tensor, k: Tensor) -> Tensor:
        """As :meth:`log_kernel`, of the exact kernel that random features estimate."""
        return self.log_kernel(q, k)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Mix the values: q, k, v of (B, H, N, head_dim) to (B, H, N, head_dim)."""
        raise NotImplementedError

    def advance(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Take one token's q, k, v of (B, H, 1, head_dim) into the state and return its mixed values beside it."""
        raise NotImplementedError

    @torch.jit.unused
    def attend_packed(self, x: Tensor, attn_mask: Tensor | None) -> Tensor | None:
        """Mix the values of a packed projection at once, (B, N, 3 dim) to (B, N, dim), or return None to take it apart.

        Taking apart costs several operators, and one more copy in training.
        """
        return None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the tokens, each (B, H, N, head_dim)."""
        return self.split(self.qkv(x))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, H, N, head_dim), of a packed projection."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            q, k, v = views(x, self.num_heads, self.head_dim)
        else:
            q, k, v = unpack(x, self.num_heads, self.head_dim)
        return self.q_norm(q), self.k_norm(k), v

    def place(
        self, q: Tensor, k: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Turn queries and keys (B, H, N, head_dim) by rotary positions, and centre the keys if that is chosen."""
        if rope is not None:
            q, k = rotate(q, rope, self.rotate_half), rotate(k, rope, self.rotate_half)
        if self.center_keys:
            if is_causal:
                raise UnsupportedError("center_keys sees tokens to come; use center_keys=False where is_causal=True")
            k = k - self.center(q, k, attn_mask)
        return q, k

    def center(self, q: Tensor, k: Tensor, attn_mask: Tensor | None) -> Tensor:
        """Return what ``center_keys`` subtracts from every key, (B, H, 1, head_dim): the mean key."""
        return mean_of(k, key_mask(attn_mask))

    def convolve(self, v: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """Return the local convolution of the values, (B, H, N, head_dim); zero at prefix tokens."""
        if grid is None:
            raise UnsupportedError("local needs grid=(H, W) in every call; use it in a model that passes the grid")
        B, _, N, _ = v.shape
        prefix = N - grid[0] * grid[1]
        image = v[:, :, prefix:].transpose(-2, -1).reshape(B, self.dim, grid[0], grid[1])
        assert self.local is not None
        near = self.local(image).reshape(B, self.num_heads, self.head_dim, N - prefix).transpose(-2, -1)
        return nn.functional.pad(near, [0, 0, prefix, 0])

    def finish(self, mixed: Tensor) -> Tensor:
        """Join the heads of the mixed values and project them: (B, H, N, head_dim) to (B, N, dim)."""
        B, _, N, _ = mixed.shape
        return self.proj_drop(self.proj(self.norm(mixed.transpose(1, 2).reshape(B, N, self.dim))))

    def _input_projection(self, bias: bool, factory: dict[str, Any]) -> nn.Module:
        return nn.Linear(self.dim, 3 * self.dim, bias=bias, **factory)


def refuse_order() -> None:
    """Refuse what a mechanism without a causal form is asked for.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        "is_causal and step: this mechanism reads all tokens before it mixes any, so it has no causal form; "
        "use is_causal=False, or a mechanism that docs/attention.md gives a state"
    )


def key_mask(attn_mask: Tensor | None) -> Tensor | None:
    """Return a key padding mask as a column, broadcastable to (B, H, N, 1).

    Raises:
        UnsupportedError: the mask is not boolean, or differs from query to query.
    """
    if attn_mask is None:
        return None
    if attn_mask.dtype != torch.bool or attn_mask.dim() < 2 or attn_mask.shape[-2] != 1:
        raise UnsupportedError(
            f"attn_mask: got {attn_mask.dtype} of shape {attn_mask.shape}; this mechanism accepts a boolean key "
            "padding mask, broadcastable to (B, heads, 1, N), or is_causal=True"
        )
    return attn_mask.transpose(-2, -1)


def mean_of(x: Tensor, keep: Tensor | None) -> Tensor:
    """Return the mean over the tokens of ``x`` (B, H, N, D) that a key mask keeps, (B, H, 1, D), in the type of x."""
    if keep is None:
        return x.mean(-2, keepdim=True)
    count = keep.expand_as(x[..., :1]).sum(-2, keepdim=True).clamp(min=1)
    return (widen(outcast(x, keep)).sum(-2, keepdim=True) / count).to(x.dtype)


def softmax_over(log_kernel: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Normalise the kernel of all pairs over the keys that a query may see; zeros where it may see none."""
    mask = allowed(log_kernel, attn_mask, is_causal)
    return log_kernel.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0)


def allowed(pairs: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return which of all pairs, (B, H, N, N), a mask and causality leave."""
    mask = torch.ones_like(pairs, dtype=torch.bool)
    mask = mask.tril() if is_causal else mask
    return mask if attn_mask is None else mask & attn_mask


def _full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Features are computed in the precision that a mechanism chooses; autocast would round them under its hands."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _norm(norm_layer: type[nn.Module] | None, width: int, factory: dict[str, Any]) -> nn.Module:
    if norm_layer is None:
        raise ConfigError("qk_norm and scale_norm need norm_layer, a constructor such as torch.nn.LayerNorm")
    return norm_layer(width, **factory)
