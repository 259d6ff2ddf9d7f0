"""A converted model fitted to its teacher in closed form: ridge regression, block by block, in one pass of images."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention import Attention
from visionattn.conversion.calibrate import Images, batches
from visionattn.conversion.units import units_of
from visionattn.errors import ConfigError

_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of a change of the weights, in parts of the mean square of what they multiply."""


class _Call:
    """A batch on its way through the blocks: tokens of both models, and the other arguments of every block."""

    def __init__(self, tokens: Tensor, options: dict[str, Any]) -> None:
        self.student = self.teacher = tokens
        self.options = options


@torch.no_grad()
def refit(student: nn.Module, teacher: nn.Module, images: Images) -> None:
    """Change the output projections of a student's blocks, in place, so that its tokens follow its teacher's.

    From the first converted block on, the last layers of attention and MLP are fitted so that the tokens after them are
    the teacher's, given the student's own tokens before them: errors of earlier blocks are made good as far as a linear
    layer can. A convolution of ``local`` is fitted to what the linear attention misses. Each penalty is the one that is
    best on every fourth batch. It takes a pass of both models and a minute of a CPU for a small model; there are
    ``dim`` numbers to fit a channel, so give a hundred images and more.

    Args:
        student: as :func:`~visionattn.conversion.convert.convert` returned it.
        teacher: what it was converted from.
        images: a tensor (B, 3, H, W), normalised as the model wants it, or batches of such.

    Raises:
        ConfigError: the blocks are not pre-norm blocks in a row, as those of timm's ViT and EVA are; there are too few
            images.
    """
    ours, theirs, first = _rows(student, teacher)
    calls = _enter(student, teacher, ours[0], theirs[0], images)
    if len(calls) < 2:
        raise ConfigError("refit: one batch of images is not enough; give two and more, some are held out")
    for index, (block, truth) in enumerate(zip(ours, theirs, strict=True)):
        if index >= first:
            _fit_attention(block, truth, calls)
            _fit_mlp(block, truth, calls)
        for call in calls:
            call.student, call.teacher = block(call.student, **call.options), truth(call.teacher, **call.options)


def _rows(student: nn.Module, teacher: nn.Module) -> tuple[list[Any], list[Any], int]:
    """Return all blocks of both models and the index of the first that is converted."""
    paths = [unit.path for unit in units_of(student, teacher)]
    owner, _, first = paths[0].rpartition(".")
    ours, theirs = student.get_submodule(owner), teacher.get_submodule(owner)
    if {path.rpartition(".")[0] for path in paths} != {owner} or not isinstance(ours, nn.ModuleList | nn.Sequential):
        raise ConfigError("refit: the converted blocks are not in one row of blocks; use align instead")
    for block in ours:
        if not all(hasattr(block, part) for part in ("norm1", "attn", "norm2", "mlp")) or hasattr(block, "norm3"):
            raise ConfigError(f"refit: {type(block).__name__} is no pre-norm block of timm; use align instead")
    return list(ours), list(theirs), int(first)  # type: ignore[call-overload]


def _enter(student: Any, teacher: Any, block: Any, truth: Any, images: Images) -> list[_Call]:
    """Return what the first blocks of both models are called with, which is the same, for every batch."""
    device, calls = next(student.parameters()).device, list[_Call]()

    class EnteredError(Exception):
        """Ends a pass: the blocks are called one by one."""

    def hook(module: Any, args: Any, options: Any) -> None:
        calls.append(_Call(args[0], options))
        raise EnteredError

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in batches(images):
            try:
                student(batch.to(device))
            except EnteredError:
                continue
            raise ConfigError("refit: the first block was not called; use align instead")
    finally:
        handle.remove()
    return calls


@contextmanager
def _inputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of modules that are called once each, in the order of the calls."""
    seen: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _fit_attention(block: Any, truth: Any, calls: list[_Call]) -> None:
    """Fit the convolution and the output projection of a block's attention."""
    if isinstance(block.attn, Attention) and block.attn.local is not None:
        _fit_local(block, truth, calls)
    problem = _Ridge()
    gain = _gain(block, 1)
    for call in calls:
        with _inputs_of(truth.norm2) as middle:
            truth(call.teacher, **call.options)
        with _inputs_of(block.attn.proj, block.norm2) as seen:
            block(call.student, **call.options)
        problem.add(seen[0], middle[0] - seen[1])
    problem.apply(block.attn.proj, gain)


def _fit_mlp(block: Any, truth: Any, calls: list[_Call]) -> None:
    """Fit the last layer of a block's MLP."""
    last = [module for module in block.mlp.modules() if isinstance(module, nn.Linear)][-1]
    problem = _Ridge()
    for call in calls:
        with _inputs_of(last) as seen:
            found = block(call.student, **call.options)
        problem.add(seen[0], truth(call.teacher, **call.options) - found)
    problem.apply(last, _gain(block, 2))


def _fit_local(block: Any, truth: Any, calls: list[_Call]) -> None:
    """Fit each channel of the convolution over the values to what the attention misses of its teacher's."""
    attention = block.attn
    side = attention.local.kernel_size[0]
    gram: Any = 0
    cross: Any = 0
    for call in calls:
        with _inputs_of(truth.attn.proj) as wanted:
            truth(call.teacher, **call.options)
        with _inputs_of(attention.qkv, attention.proj) as seen:
            block(call.student, **call.options)
        height, width = _grid_of(attention, block, call)
        prefix = seen[0].shape[1] - height * width
        values = attention.qkv(seen[0])[:, prefix:].chunk(3, -1)[2].transpose(1, 2)
        values = values.reshape(len(values), -1, height, width)
        near = F.unfold(values, side, padding=side // 2).reshape(len(values), attention.dim, side * side, -1)
        near = torch.cat((near, torch.ones_like(near[:, :, :1])), 2).double()  # (B, C, 9 + 1, H W)
        missing = (wanted[0] - seen[1])[:, prefix:].transpose(1, 2).double()
        gram = gram + torch.einsum("bcin,bcjn->cij", near, near)
        cross = cross + torch.einsum("bcin,bcn->ci", near, missing)
    penalty = 1e-2 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    found = torch.linalg.solve(gram + penalty[:, None, None] * eye, cross)
    weight, bias = attention.local.weight, attention.local.bias
    weight.add_(found[:, :-1].view_as(weight).to(weight.dtype))
    bias.add_(found[:, -1].to(bias.dtype))


def _grid_of(attention: Any, block: Any, call: _Call) -> tuple[int, int]:
    """Return the grid that the attention is given."""
    seen: list[Any] = []
    handle = attention.register_forward_pre_hook(lambda m, a, options: seen.append(options["grid"]), with_kwargs=True)
    try:
        block(call.student, **call.options)
    finally:
        handle.remove()
    height, width = seen[0]
    return height, width


def _gain(block: Any, number: int) -> Tensor | None:
    """Return the LayerScale of a block's attention (1) or MLP (2), or None."""
    scale = getattr(block, f"ls{number}", None)
    gain = getattr(scale, "gamma", None) if scale is not None else getattr(block, f"gamma_{number}", None)
    return gain if isinstance(gain, Tensor) else None


class _Ridge:
    """Regression of what is missing on the inputs of a linear layer, with some batches held out."""

    def __init__(self) -> None:
        self.count = 0
        self.gram: list[Any] = [0, 0]
        self.cross: list[Any] = [0, 0]

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Take inputs (B, N, C) and what is missing after the layer (B, N, E)."""
        x = F.pad(inputs.float().flatten(0, 1), [0, 1], value=1.0)
        held = int(self.count % 4 == 1)
        self.gram[held] = self.gram[held] + (x.T @ x).double()
        self.cross[held] = self.cross[held] + (x.T @ missing.float().flatten(0, 1)).double()
        self.count += 1

    def apply(self, layer: nn.Linear, gain: Tensor | None) -> None:
        """Add the change of weights that is best on what was held out, of all penalties, fitted to everything."""
        fitted = self._solutions(self.gram[0], self.cross[0])

        def left(change: Tensor) -> Any:
            return (change * (self.gram[1] @ change - 2 * self.cross[1])).sum()

        scores = [left(change).item() for change in fitted]
        best = min(range(len(scores)), key=scores.__getitem__)
        if scores[best] >= 0:
            return
        change = self._solutions(self.gram[0] + self.gram[1], self.cross[0] + self.cross[1])[best].T
        if gain is not None:
            wide = gain.double()
            change = change / torch.where(wide.abs() < 1e-4, torch.inf, wide).unsqueeze(-1)
        layer.weight.add_(change[:, :-1].to(layer.weight.dtype))
        if layer.bias is not None:
            layer.bias.add_(change[:, -1].to(layer.bias.dtype))

    def _solutions(self, gram: Any, cross: Any) -> list[Tensor]:
        values, vectors = torch.linalg.eigh(gram)
        turned, unit = vectors.T @ cross, values.mean()
        return [vectors @ (turned / (values.clamp(min=0) + p * unit).unsqueeze(-1)) for p in _PENALTIES]
