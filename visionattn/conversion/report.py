"""What a conversion did to a model, block by block and at its end."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from visionattn.atomic import write_json
from visionattn.conversion.align import tokens_of
from visionattn.conversion.calibrate import Images, batches, tapped
from visionattn.conversion.swap import find, transplant
from visionattn.record import environment


@dataclass(frozen=True)
class BlockReport:
    """An attention of the teacher, and what stands in its place.

    Attributes:
        path: of the attention in the model.
        attention: what computes it in the student; ``softmax`` where it was kept.
        error: of the student's attention on the teacher's inputs, relative to the output of the teacher's.
        entropy: of the teacher's attention weights, in parts of that of uniform ones, log N.
        largest_weight: mean largest attention weight of a query of the teacher.
        key_shift: length of the teacher's mean key over the mean length of its keys, in each image.
    """

    path: str
    attention: str
    error: float
    entropy: float
    largest_weight: float
    key_shift: float


@dataclass(frozen=True)
class Speed:
    """Time and memory of both models at a size of image.

    Attributes:
        size: (H, W) in pixels.
        tokens: that the blocks see.
        softmax: median time of a call of the teacher, in milliseconds.
        converted: likewise of the student.
        softmax_memory: bytes that a call of the teacher needs above what was allocated; None on the CPU.
        converted_memory: likewise of the student.
        form: ``eager``, ``graph``, ``compiled`` or ``compiled graph``: the fastest form of each model.
    """

    size: tuple[int, int]
    tokens: int
    softmax: float
    converted: float
    softmax_memory: int | None = None
    converted_memory: int | None = None
    form: str = "eager"


@dataclass
class ConversionReport:
    """What is left of a teacher in its student; :func:`print` by rich shows tables, :meth:`save` writes JSON.

    Attributes:
        cosine: mean cosine of the final tokens.
        centred_cosine: likewise, both less the teacher's mean token, which flatters the plain cosine.
        error: of the final tokens, relative to their size.
        images: how many were looked at.
        blocks: all attentions, in the order of the model.
        speeds: as :func:`visionattn.profiling.crossover.measure_crossover` found them; empty if it was not asked.
        metrics: what the caller adds: a score before and after, say.
    """

    cosine: float
    centred_cosine: float
    error: float
    images: int
    blocks: list[BlockReport]
    speeds: list[Speed] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def crossover(self) -> int | None:
        """Tokens of the smallest size measured from which on the student is the faster one; None if there is none."""
        found = None
        for speed in sorted(self.speeds, key=lambda speed: speed.tokens, reverse=True):
            if speed.converted >= speed.softmax:
                break
            found = speed.tokens
        return found

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, with device, versions, commit and command."""
        content = asdict(self) | {"crossover": self.crossover, "environment": environment()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), content)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Show the report as tables."""
        table = Table("attention", "is", "error", "entropy", "largest weight", "key shift")
        for block in self.blocks:
            figures = (block.error, block.entropy, block.largest_weight, block.key_shift)
            table.add_row(block.path, block.attention, *(f"{figure:.3f}" for figure in figures))
        yield table
        yield (
            f"final tokens of {self.images} images: cosine {self.cosine:.3f}, centred {self.centred_cosine:.3f}, "
            f"relative error {self.error:.3f}"
        )
        for name, value in self.metrics.items():
            yield f"{name}: {value:.4g}"
        if self.speeds:
            table = Table("size", "tokens", "form", "softmax, ms", "converted, ms", "times as fast")
            for speed in self.speeds:
                times = (f"{speed.softmax:.2f}", f"{speed.converted:.2f}", f"{speed.softmax / speed.converted:.2f}")
                table.add_row("x".join(map(str, speed.size)), str(speed.tokens), speed.form, *times)
            yield table
            yield f"faster from {self.crossover} tokens on" if self.crossover else "not faster at any of these sizes"


class _Sums:
    """Sums of figures over images, one set a name."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, **figures: float) -> None:
        for name, value in figures.items():
            self.values[name] = self.values.get(name, 0.0) + value


@torch.no_grad()
def report(student: nn.Module, teacher: nn.Module, images: Images) -> ConversionReport:
    """Compare a converted model with its teacher.

    The attention weights of the teacher are formed, N x N numbers a head and image: a few dozen images are enough.

    Args:
        student: as :func:`~visionattn.conversion.convert.convert` returned it, trained or not.
        teacher: what it was converted from.
        images: a tensor (B, 3, H, W), normalised as the model wants it, or batches of such.
    """
    layers: dict[str, Any] = student.attention_layers  # type: ignore[assignment]
    modules = find(teacher).convertible
    softmax: dict[str, Any] = {path: transplant(old, {"name": "softmax"}) for path, old in modules.items()}
    sums = {path: _Sums() for path in modules}
    grid = getattr(student, "attention_grid", None)
    device = next(teacher.parameters()).device

    def see(path: str, x: Tensor, options: dict[str, Any]) -> None:
        if grid is not None:
            options = options | {"grid": grid.size} if path in layers else options
        expected = modules[path].forward(x, **{key: value for key, value in options.items() if key != "grid"})
        found = student.get_submodule(path).forward(x, **options) if path in layers else expected
        sums[path].add(
            missed=(found - expected).square().sum().item(), size=expected.square().sum().item(), count=len(x)
        )
        q, k, _ = softmax[path].project(x)
        q, k = softmax[path].place(q, k, options.get("rope"), None, False)
        shift = k.mean(-2).norm(dim=-1) / k.norm(dim=-1).mean(-1).clamp(min=1e-12)
        for one, other in zip(q, k, strict=True):
            logs = softmax[path].log_kernel(one, other).float().log_softmax(-1)
            entropy = -(logs.exp() * logs).sum(-1).mean() / torch.tensor(float(logs.shape[-1])).log()
            sums[path].add(entropy=entropy.item(), largest_weight=logs.amax(-1).exp().mean().item())
        sums[path].add(key_shift=shift.mean(-1).sum().item())

    final, middle, training = _Sums(), torch.zeros(0), (student.training, teacher.training)
    student.eval(), teacher.eval()
    for batch in batches(images):
        batch = batch.to(device)
        found = tokens_of(student, batch).float()  # first: it reads the grid
        with tapped(modules, see):
            expected = tokens_of(teacher, batch).float()
        middle = middle if middle.numel() else expected.flatten(0, -2).mean(0)
        about = F.cosine_similarity(found - middle, expected - middle, dim=-1).mean().item()
        plain = F.cosine_similarity(found, expected, dim=-1).mean().item()
        final.add(plain=plain * len(batch), about=about * len(batch), count=len(batch))
        final.add(missed=(found - expected).square().sum().item(), size=expected.square().sum().item())
    student.train(training[0]), teacher.train(training[1])
    return ConversionReport(
        cosine=final.values["plain"] / final.values["count"],
        centred_cosine=final.values["about"] / final.values["count"],
        error=(final.values["missed"] / final.values["size"]) ** 0.5,
        images=int(final.values["count"]),
        blocks=[_block(path, layers, sums[path].values) for path in modules],
    )


def _block(path: str, layers: dict[str, Any], sums: dict[str, float]) -> BlockReport:
    figures = {name: sums[name] / sums["count"] for name in ("entropy", "largest_weight", "key_shift")}
    error = (sums["missed"] / max(sums["size"], 1e-30)) ** 0.5
    return BlockReport(path, layers[path]["name"] if path in layers else "softmax", error, **figures)
