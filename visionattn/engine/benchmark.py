"""Many trainings under one recipe, several at once, each in a folder of its own that can be gone on with."""

import csv
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict

from visionattn.atomic import write_text
from visionattn.config import DetectConfig
from visionattn.detection import fingerprint, load_detector
from visionattn.engine.train import train
from visionattn.errors import ConfigError
from visionattn.record import environment

LOSS_POINTS = 30
"""Points of a loss curve that a report keeps."""


class Run(BaseModel):
    """A training and what came of it.

    Attributes:
        model: name, yaml or weights that it began with.
        seed: of the training.
        fingerprint: of the model, see :func:`~visionattn.detection.fingerprint`.
        commit: that it was trained at.
        device: of the machine that ended it.
        parameters: with batch normalisation folded; of a head with two branches, those of one.
        scores: COCO metrics of its weights on the val split, by name.
        losses: epochs and the sum of training losses after each, some of them.
        reason: why there are no scores.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    seed: int
    fingerprint: str = ""
    commit: str | None = None
    device: str | None = None
    parameters: int | None = None
    scores: dict[str, Any] = {}
    losses: list[tuple[int, float]] = []
    reason: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Which training of a benchmark it is: name of the model, and seed."""
        return Path(self.model).stem, self.seed


class Benchmark(BaseModel):
    """All runs of a recipe.

    Attributes:
        recipe: the configuration that they share.
        runs: one a model and seed.
    """

    model_config = ConfigDict(frozen=True)

    recipe: dict[str, Any]
    runs: list[Run]

    def trained(self, entry: "Entry") -> Run | None:
        """Return the run of an entry if it is here, with scores, of the same model."""
        digest = fingerprint(entry.config.model)
        known = (run for run in self.runs if run.key == entry.key)
        return next((run for run in known if run.scores and run.fingerprint == digest), None)


@dataclass(frozen=True)
class Entry:
    """A training to be done.

    Attributes:
        config: of it; its name is that of its folder.
        log: file that takes what it prints.
    """

    config: DetectConfig
    log: Path

    @property
    def key(self) -> tuple[str, int]:
        """As that of its :class:`Run`."""
        return Path(self.config.model).stem, self.config.seed


def recipe_of(config: DetectConfig) -> dict[str, Any]:
    """Return what the runs of a benchmark share; of the data, the name of its folder, wherever that is."""
    shared = config.model_dump(mode="json", exclude={"model", "seed", "name", "output", "device", "workers"})
    return shared | {"data": Path(config.data).parent.name or config.data}


def read_benchmark(path: Path, config: DetectConfig) -> Benchmark:
    """Read a report to go on with, or begin one if there is none.

    Raises:
        ConfigError: it is no such report, or one of another recipe.
    """
    recipe = recipe_of(config)
    if not path.exists():
        return Benchmark(recipe=recipe, runs=[])
    try:
        report = Benchmark.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no report of a benchmark; choose another --output") from error
    changed = [key for key in recipe if report.recipe.get(key) != recipe[key]]
    if changed:
        raise ConfigError(f"{path} is of another recipe ({', '.join(changed)} differ); choose another --output")
    return report


def plan_runs(config: DetectConfig, models: Sequence[str], seeds: Sequence[int]) -> list[Entry]:
    """Return a training for each model and seed, in folders named after the recipe, the model and the seed.

    Raises:
        ConfigError: two trainings would share a folder.
    """
    stems = [Path(model).stem for model in models]
    double = {stem for stem in stems if stems.count(stem) > 1}
    if double:
        raise ConfigError(f"models share the names {', '.join(sorted(double))}; give each yaml a name of its own")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"got the seeds {', '.join(map(str, seeds))}; give each once")
    entries = []
    for seed in seeds:
        for model, stem in zip(models, stems, strict=True):
            name = f"{config.name}-{stem}-seed{seed}"
            own = config.model_copy(update={"model": model, "seed": seed, "name": name})
            entries.append(Entry(own, config.output / "logs" / f"{name}.log"))
    return entries


def write_models(models: Iterable[tuple[str, dict[str, Any]]], folder: Path) -> list[str]:
    """Write yamls under their names; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in models:
        path = folder / f"{name}.yaml"
        write_text(path, yaml.safe_dump(content, sort_keys=False))
        paths.append(str(path))
    return paths


def run_all(entries: Sequence[Entry], jobs: int, keep: Callable[[Sequence[Run]], None]) -> list[Run]:
    """Do trainings, ``jobs`` at a time; what is finished already is not done again, what was stopped goes on.

    Args:
        entries: what to train.
        jobs: processes.
        keep: takes the runs so far whenever one has ended.

    Returns:
        A run for each entry, in their order; one that failed says why.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))  # workers inherit it
    done: dict[int, Run] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(run_one, entry): index for index, entry in enumerate(entries)}
        for future in as_completed(waiting):
            done[waiting[future]] = future.result()
            keep([done[index] for index in sorted(done)])
    return [done[index] for index in range(len(entries))]


def run_one(entry: Entry) -> Run:
    """Train one; all that it prints goes to its log."""
    entry.log.parent.mkdir(parents=True, exist_ok=True)
    config = entry.config
    with entry.log.open("a", buffering=1) as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    try:
        result = train(config, resume=True)
    except Exception as error:  # the others go on; the log has the rest
        traceback.print_exc()
        return Run(model=config.model, seed=config.seed, reason=f"{type(error).__name__}: {error} (see {entry.log})")
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    network: Any = load_detector(result.weights).model
    record = environment()
    return Run(
        model=config.model,
        seed=config.seed,
        fingerprint=fingerprint(config.model),
        commit=record["commit"],
        device=record["device"],
        parameters=sum(parameter.numel() for parameter in network.fuse(verbose=False).parameters()),
        scores=result.metrics,
        losses=list(_thinned(_losses(result.folder / "results.csv"))),
    )


def _losses(results: Path) -> list[tuple[int, float]]:
    """Read epochs and the sum of training losses."""
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file, skipinitialspace=True))
    return [
        (int(row["epoch"]), round(sum(float(value) for key, value in row.items() if key.startswith("train/")), 4))
        for row in rows
    ]


def _thinned(losses: list[tuple[int, float]]) -> Iterable[tuple[int, float]]:
    step = max(1, len(losses) // LOSS_POINTS)
    return losses[step - 1 :: step]
