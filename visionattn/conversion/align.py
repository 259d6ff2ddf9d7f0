"""Teaching a converted model to do what its teacher does, without labels."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from visionattn.conversion.parallel import averaged, is_first, rank
from visionattn.conversion.units import Unit, units_of
from visionattn.errors import ConfigError, WeightsError, suggest

Stage = Literal["blocks", "features"]
_RATES = {"blocks": 1e-3, "features": 1e-4}
_CLASS_WEIGHT = 0.25
_WARM_UP = 0.05
"""Share of the steps in which the rate rises from zero."""


@dataclass
class Alignment:
    """What an alignment did.

    Attributes:
        stage: ``blocks`` or ``features``.
        steps: optimizer steps taken, those of earlier sittings included.
        seconds: time they took.
        losses: the mean loss of each twentieth of the steps.
    """

    stage: str
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def align(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    stage: Stage = "blocks",
    steps: int = 0,
    rate: float = 0.0,
    weight_decay: float = 0.0,
    head: Callable[[Tensor], Tensor] | None = None,
    folder: str | Path | None = None,
    save_every: float = 30.0,
    precision: Literal["bf16", "fp32"] = "bf16",
    seed: int = 0,
    progress: bool = True,
) -> Alignment:
    """Train a converted model, in place, to compute what its teacher computes; no labels.

    Use ``blocks`` first: every block learns its teacher's output from its teacher's input, all blocks from one pass of
    the teacher. Their graphs are freed one by one, so the memory is that of a single block. ``features`` then trains
    all weights to give the teacher's final tokens. On two GPUs and more, run it by torchrun with a loader for each
    process; gradients are averaged.

    Everything random in the loader should come from the generators of torch or Python, which are seeded for every pass
    of the loader, or from its ``set_epoch``: a run that was stopped then goes on to the weights of one that was not.

    Args:
        student: as :func:`~visionattn.conversion.convert.convert` returned it.
        teacher: what it was converted from; it is not changed. Both on the device to train on.
        loader: batches of images (B, 3, H, W), of any sizes; of tuples and lists, the first part counts. Iterated again
            as often as needed.
        stage: ``blocks`` or ``features``.
        steps: of the optimizer; 0 for one pass of the loader.
        rate: of AdamW, reached after a twentieth of the steps, from where it falls to zero as a cosine; 0 for 1e-3 in
            ``blocks`` and 1e-4 in ``features``.
        weight_decay: of AdamW.
        head: of ``features``: a frozen function of the final tokens (B, N, C), whose outputs are matched as well.
        folder: where the run is kept while it lasts, and found again; None to keep nothing.
        save_every: seconds between savings.
        precision: of the products, by autocast; weights and losses are in float32.
        seed: of the loader's passes.
        progress: show a progress bar.

    Raises:
        ConfigError: an option is unknown, the loader is empty, or the student was not converted.
        WeightsError: the folder holds another run.
    """
    if stage not in _RATES:
        raise ConfigError(f"stage={stage!r}; {suggest(str(stage), _RATES)}")
    if precision not in ("bf16", "fp32"):
        raise ConfigError(f"precision={precision!r}; accepted: bf16, fp32")
    if not steps and not hasattr(loader, "__len__"):
        raise ConfigError("steps=0 is one pass of the loader, whose length this one does not tell; give steps")
    steps = steps or len(loader)  # type: ignore[arg-type]
    about = {"stage": stage, "steps": steps, "rate": rate or _RATES[stage], "decay": weight_decay, "seed": seed}
    run = _Run(student, teacher, about, head, precision)
    file = Path(folder) / f"align-{stage}.pt" if folder else None
    if file and file.exists():
        run.load(file)
    saved = started = time.perf_counter()
    before = run.done.seconds
    title = f"align {stage}"
    with tqdm(total=steps, initial=run.done.steps, desc=title, disable=not (progress and is_first())) as bar:
        for images in _passes(loader, run.done.steps, steps, seed):
            loss = run.step(images)
            run.done.seconds = before + time.perf_counter() - started
            if loss is not None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            if file and (time.perf_counter() - saved >= save_every or run.done.steps == steps):
                run.save(file)
                saved = time.perf_counter()
    return run.done


class _Run:
    """A student, its teacher and the optimizer."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, about: dict[str, Any], head: Any, precision: str
    ) -> None:
        self.student, self.teacher, self.about, self.head = student.eval(), teacher.eval(), about, head
        self.units = units_of(student, teacher)
        parts: list[nn.Module] = [unit.student for unit in self.units] if about["stage"] == "blocks" else [student]
        self.groups = [[p for p in part.parameters() if p.requires_grad] for part in parts]
        parameters = [p for group in self.groups for p in group]
        self.device = next(student.parameters()).device
        self.optimizer = torch.optim.AdamW(
            parameters, lr=about["rate"], weight_decay=about["decay"], fused=self.device.type == "cuda"
        )
        self.cast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.done = Alignment(about["stage"])
        self.middle = torch.zeros(0)
        """The teacher's mean token on the first batch: what all tokens share is not to flatter a cosine."""
        self.recent: list[Tensor] = []

    def step(self, images: Tensor) -> float | None:
        """Take a step; return the mean loss of the last twentieth of the steps, None before it is known."""
        self._set_rate()
        images = images.to(self.device, non_blocking=True)
        loss = self._blocks(images) if self.about["stage"] == "blocks" else self._features(images)
        for group in self.groups:
            averaged(group)
            nn.utils.clip_grad_norm_(group, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.recent.append(loss)
        self.done.steps += 1
        part = max(1, self.about["steps"] // 20)
        if self.done.steps % part == 0 or self.done.steps == self.about["steps"]:
            mean = torch.stack(self.recent).mean().item()
            if not math.isfinite(mean):
                raise ConfigError(
                    f"the loss is {mean} after {self.done.steps} steps; lower rate ({self.about['rate']})"
                )
            self.done.losses.append(mean)
            self.recent.clear()
        return self.done.losses[-1] if self.done.losses else None

    def _set_rate(self) -> None:
        steps, now = self.about["steps"], self.done.steps
        warm = max(1, int(_WARM_UP * steps))
        share = (now + 1) / warm if now < warm else (1 + math.cos(math.pi * (now - warm) / max(1, steps - warm))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.about["rate"] * share

    def _blocks(self, images: Tensor) -> Tensor:
        grid = getattr(self.student, "attention_grid", None)
        if grid is not None:
            grid.read(self.student.patch_embed, (images,))
        with torch.no_grad(), self.cast:
            calls = _watch(self.teacher, self.units, images)
        losses = []
        for unit, (inputs, options, expected) in zip(self.units, calls, strict=True):
            with self.cast:
                found = unit.student(*inputs, **options)
            loss = _relative(found, expected, inputs[0])
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def _features(self, images: Tensor) -> Tensor:
        with self.cast:
            with torch.no_grad():
                expected = tokens_of(self.teacher, images)
            found = tokens_of(self.student, images)
        found, expected = found.float(), expected.float()
        if not self.middle.numel():
            self.middle = expected.flatten(0, -2).mean(0)
        size = expected.std()
        cosine = F.cosine_similarity(found - self.middle, expected - self.middle, dim=-1)
        loss = (1 - cosine).mean() + F.smooth_l1_loss(found / size, expected / size)
        if self.head is not None:
            ours, theirs = self.head(found), self.head(expected).detach()
            loss = loss + F.smooth_l1_loss(ours, theirs) / theirs.std().clamp(min=1e-6)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def save(self, file: Path) -> None:
        """Write all that :meth:`load` needs, whole or not at all."""
        if not is_first():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        state = {
            "about": self.about,
            "done": asdict(self.done),
            "recent": self.recent,
            "middle": self.middle,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, partial)
        partial.replace(file)

    def load(self, file: Path) -> None:
        """Go on from a file that :meth:`save` wrote.

        Raises:
            WeightsError: it is damaged, or of another run.
        """
        advice = "give another folder, or remove the file to begin anew"
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
            about = state["about"]
            if about == self.about:
                self.student.load_state_dict(state["student"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.done, self.recent, self.middle = Alignment(**state["done"]), state["recent"], state["middle"]
        except Exception as error:  # damaged files raise what they like
            raise WeightsError(f"{file} cannot be gone on from ({error}); {advice}") from error
        if about != self.about:
            changed = ", ".join(
                f"{key} was {about.get(key)}" for key in self.about if about.get(key) != self.about[key]
            )
            raise WeightsError(f"{file} is of another run ({changed}); {advice}")


def tokens_of(model: Any, images: Tensor) -> Tensor:
    """Return the final tokens of a model, (B, N, C), or whatever it returns if it has no ``forward_features``."""
    tokens: Tensor = model.forward_features(images) if hasattr(model, "forward_features") else model(images)
    return tokens


def _watch(teacher: nn.Module, units: list[Unit], images: Tensor) -> list[tuple[Any, Any, Tensor]]:
    """Run the teacher and return the arguments and the output of each of its units."""
    seen: dict[int, tuple[Any, Any, Tensor]] = {}

    def hook(index: int) -> Any:
        return lambda module, inputs, options, output: seen.__setitem__(index, (inputs, options, output))

    handles = [u.teacher.register_forward_hook(hook(i), with_kwargs=True) for i, u in enumerate(units)]
    try:
        tokens_of(teacher, images)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[index] for index in range(len(units))]


def _relative(found: Tensor, expected: Tensor, inputs: Tensor) -> Tensor:
    """Squared error over the squared size of what the block adds to its input; the first token counts twice."""
    error = (found.float() - expected.float()).square()
    size = (expected.float() - inputs.float()).square()
    whole = error.mean() / size.mean().clamp(min=1e-12)
    return whole + _CLASS_WEIGHT * error[:, 0].mean() / size[:, 0].mean().clamp(min=1e-12)


def _passes(loader: Iterable[Any], first: int, last: int, seed: int) -> Iterator[Tensor]:
    """Yield the batches of steps ``first`` to ``last``, whatever was taken before."""
    step = epoch = 0
    while step < last:
        number = hash((seed, epoch, rank())) % 2**31
        torch.manual_seed(number)
        random.seed(number)
        for part in (loader, getattr(loader, "sampler", None)):
            set_epoch = getattr(part, "set_epoch", None)
            if set_epoch:
                set_epoch(epoch)
        before = step
        for batch in loader:
            if step == last:
                return
            if step >= first:
                yield batch[0] if isinstance(batch, list | tuple) else batch
            step += 1
        if step == before:
            raise ConfigError("loader: it is empty; give one with images")
        epoch += 1
