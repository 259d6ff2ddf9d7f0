"""Kill trainings at random moments, resume them, and check that a kill never costs more than one epoch.

python -m tests.kill_and_resume --kills 20 --output results/kill_and_resume.json

Each task is first trained undisturbed, which tells how long its phases take and how it ends. Then the same training is
started with --resume and killed (SIGKILL, its whole process group) again and again: in start-up, in the middle of an
epoch, while a checkpoint is written, and after the last epoch. One more start finishes it. Exit code 1 and a list of
faults if anything was lost.
"""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from tests.engine.conftest import classify_config, make_class_folders
from visionattn.atomic import write_json
from visionattn.cli import run as run_app
from visionattn.config import TrainConfig, parse_config
from visionattn.data.scenes import make_scenes
from visionattn.deployment import load_runner
from visionattn.detection.loading import read_checkpoint
from visionattn.detection.trainer import recover
from visionattn.record import environment

TOOL = Path(__file__).parents[1] / "tools" / "train.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
WEIGHTS = {"detect": "best.pt", "classify": "best.safetensors"}
MOST_TRIES = 10
"""How often a start that ended before its kill is tried again."""

app = typer.Typer(add_completion=False)


@dataclass
class Training:
    """A configuration file and the folder that its runs go to."""

    task: str
    config: Path
    output: Path
    epochs: int

    @property
    def folder(self) -> Path:
        return self.output / self.task / self.config.stem

    @property
    def log(self) -> Path:
        return self.output.with_suffix(".log")

    @property
    def weights(self) -> Path:
        return self.folder / "weights" / WEIGHTS[self.task]

    def start(self) -> "subprocess.Popen[bytes]":
        command = [
            sys.executable,
            str(TOOL),
            "--config",
            str(self.config),
            "--set",
            f"output={self.output}",
            "--resume",
        ]
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.config.parent, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
            )

    def rows(self) -> list[dict[str, str]]:
        try:
            with (self.folder / "results.csv").open(newline="") as file:
                return list(csv.DictReader(file))
        except FileNotFoundError:
            return []

    def logged(self) -> list[int]:
        """The epochs that stand in results.csv."""
        return [int(row["epoch"]) for row in self.rows()]

    def saved(self) -> int:
        """How many epochs the checkpoint holds that the next start will find: 0 without one, -1 if it is damaged."""
        with self.recovered() as weights:
            last = weights / "last.pt"
            try:
                if not last.exists():
                    return 0
                if self.task == "classify":
                    return len(torch.load(last, weights_only=True)["history"])
                epoch = int(read_checkpoint(last)["epoch"])
            except Exception:
                return -1
        return self.epochs if epoch == -1 else epoch + 1

    @contextmanager
    def recovered(self) -> Iterator[Path]:
        """A copy of the weights as the next start will find them, which must not be done for it."""
        with tempfile.TemporaryDirectory() as copy:
            weights = Path(copy) / "weights"
            if (self.folder / "weights").exists():
                shutil.copytree(self.folder / "weights", weights)
            recover(weights)
            yield weights

    def resumed_from(self) -> int | None:
        """The first epoch of the last start, as its output tells it."""
        told = re.search(r"epoch (\d+)(?:/| to )", self.log.read_text(encoding="utf-8", errors="replace"))
        return int(told[1]) if told else None

    def damage(self) -> list[str]:
        """What is under a final name but does not load, and a detector's best weights if they are not the best."""
        found = []
        for path in self.folder.glob("weights/*"):
            if path.name in ("last.pt", "best.pt", "best.safetensors"):
                try:
                    if (self.task, path.name) == ("classify", "last.pt"):
                        torch.load(path, weights_only=True)
                    else:
                        load_runner(path, "cpu")
                except Exception as error:
                    found.append(f"{path.name}: {error}")
        with self.recovered() as weights:
            if self.task == "detect" and (weights / "last.pt").exists():
                found += lost_best(weights)
        return found

    def unfinished_files(self) -> list[str]:
        return sorted(p.name for p in self.folder.rglob("*") if "partial" in p.name or "kept" in p.name)


@dataclass
class Pace:
    """Seconds of the phases of an undisturbed training: to the first epoch's end, of an epoch, after the last one."""

    startup: float
    epoch: float
    tail: float


@dataclass
class Kill:
    """A kill: when, and what it left.

    Attributes:
        moment: what it was aimed at.
        seconds: from the start of the process.
        logged: epochs in results.csv.
        saved: epochs in the checkpoint; -1 if it is damaged.
        resumed_from: first epoch of the process that was killed, if it came that far.
        unfinished: files under names that are not final.
        damage: what does not load although its name is final, and what is lost.
    """

    moment: str
    seconds: float
    logged: int
    saved: int
    resumed_from: int | None
    unfinished: list[str]
    damage: list[str]


@app.command(help=__doc__)
def main(
    output: Annotated[Path, typer.Option(help="JSON file to write")],
    kills: Annotated[int, typer.Option(help="kills a task")] = 20,
    epochs: Annotated[int, typer.Option(help="epochs a task, at least twice the kills")] = 40,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
) -> None:
    if epochs < 2 * kills:
        raise typer.BadParameter(f"got {epochs} epochs for {kills} kills, expected twice as many or more")
    with tempfile.TemporaryDirectory() as folder:
        configs = {"detect": detect_config(Path(folder), epochs), "classify": levels_config(Path(folder), epochs)}
        tasks = {}
        for task, config in configs.items():
            file = Path(folder) / f"{task}.yaml"
            file.write_text(yaml.safe_dump(config.model_dump(mode="json") | {"name": ""}))
            tasks[task] = examine(task, file, epochs, kills, random.Random(f"{seed} {task}"))
    write_json(output, {"kills": kills, "epochs": epochs, "seed": seed, "tasks": tasks, "environment": environment()})
    print(f"written: {output}")
    faults = [f"{task}: {fault}" for task, found in tasks.items() for fault in found["faults"]]
    print("\n".join(faults) or "nothing was lost")
    raise typer.Exit(bool(faults))


def detect_config(folder: Path, epochs: int) -> TrainConfig:
    make_scenes(folder / "scenes", size=64, counts={"train": 8, "val": 8})
    options = {"epochs": epochs, "batch": 4, "imgsz": 64, "device": "cpu", "workers": 0}
    ours = {"task": "detect", "model": "yolo-lat-n", "data": str(folder / "scenes" / "data.yaml"), **options}
    return parse_config(ours | {"ultralytics": {"plots": False, "nbs": 4}})  # a step of the optimizer every batch


def levels_config(folder: Path, epochs: int) -> TrainConfig:
    return classify_config(make_class_folders(folder / "levels"), folder, epochs=epochs)


def examine(task: str, config: Path, epochs: int, kills: int, rng: random.Random) -> dict[str, Any]:
    """Train undisturbed, train with kills, compare; return all that was seen."""
    reference = Training(task, config, config.with_name(f"{task}-reference"), epochs)
    pace = train_undisturbed(reference)
    print(f"{task}: undisturbed {pace.startup:.1f} s to epoch 1, {pace.epoch:.2f} s an epoch, {pace.tail:.1f} s after")
    training = Training(task, config, config.with_name(f"{task}-killed"), epochs)
    done: list[Kill] = []
    faults: list[str] = []
    for moment, target in plan(kills, epochs, rng):
        before = done[-1].saved if done else 0
        done.append(kill := start_and_kill(training, moment, target, pace, rng))
        print(
            f"{task} kill {len(done)}/{kills} ({moment}) after {kill.seconds:.2f} s: "
            f"epoch {kill.logged} in results.csv, {kill.saved} in the checkpoint"
        )
        faults += [f"kill {len(done)}: {fault}" for fault in losses(kill, training, before)]
    code = training.start().wait()
    faults += [f"at the end: {fault}" for fault in end_faults(training, reference, code, done[-1].saved)]
    return {
        "undisturbed_seconds": vars(pace),
        "kills": [vars(kill) for kill in done],
        "resumed_from": training.resumed_from(),
        "left_over": sorted(files(training.folder) - files(reference.folder)),
        "faults": faults,
    }


def train_undisturbed(training: Training) -> Pace:
    start, process = time.perf_counter(), training.start()
    wait(process, lambda: bool(training.rows()))
    first = time.perf_counter()
    wait(process, lambda: len(training.rows()) == training.epochs)
    last = time.perf_counter()
    if process.wait() or training.logged() != list(range(1, training.epochs + 1)):
        raise RuntimeError(f"the undisturbed training failed:\n{training.log.read_text()}")
    return Pace(first - start, (last - first) / (training.epochs - 1), time.perf_counter() - last)


def plan(kills: int, epochs: int, rng: random.Random) -> list[tuple[str, int]]:
    """Return the moments of the kills, with the epoch that must be in results.csv before those that wait for one."""
    early, late = kills // 5, max(1, kills // 5)
    middle = kills - early - late
    moments = ["start-up"] * early + [("epoch", "checkpoint")[i % 2] for i in range(middle)]
    rng.shuffle(moments)
    targets = iter(1 + i * (epochs - 1) // middle for i in range(middle))
    return [(m, 0 if m == "start-up" else next(targets)) for m in moments] + [("end", epochs)] * late


def start_and_kill(training: Training, moment: str, target: int, pace: Pace, rng: random.Random) -> Kill:
    """Start the training and kill it; one that ends before is taken back to before its last write, metrics.json."""
    longest = {"start-up": pace.startup / 2, "epoch": pace.epoch, "checkpoint": 0.005, "end": pace.tail}[moment]
    before = len(training.rows())
    if moment == "end" and before == target:
        longest += pace.startup
    elif moment in ("epoch", "checkpoint"):
        target = max(target, before + 1)
    for _ in range(MOST_TRIES):
        start, process = time.perf_counter(), training.start()
        wait(process, lambda: len(training.rows()) >= target)
        if moment == "checkpoint":
            wait(process, lambda: any((training.folder / "weights").glob("*partial*")))
        try:
            code = process.wait(rng.uniform(0, longest))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return look(training, moment, round(time.perf_counter() - start, 3))
        if code or moment != "end":
            raise RuntimeError(f"{moment}: ended with code {code} before its kill:\n{training.log.read_text()}")
        (training.folder / "metrics.json").unlink()
    raise RuntimeError(f"{moment}: ended before its kill {MOST_TRIES} times")


def look(training: Training, moment: str, seconds: float) -> Kill:
    """Note what a kill left."""
    logged, saved, resumed_from = len(training.rows()), training.saved(), training.resumed_from()
    return Kill(moment, seconds, logged, saved, resumed_from, training.unfinished_files(), training.damage())


def lost_best(weights: Path) -> list[str]:
    """Say so if the last epoch was a detector's best, but ``best.pt`` is older; it is not written again."""
    try:
        last, best = (read_checkpoint(weights / name) for name in ("last.pt", "best.pt"))
    except Exception as error:
        return [f"after recovery: {error}"]
    if -1 in (last["epoch"], best["epoch"]) or last["train_metrics"]["fitness"] != last["best_fitness"]:
        return []
    lost = f"epoch {last['epoch'] + 1} was the best, but best.pt is of epoch {best['epoch'] + 1}"
    return [lost] if best["epoch"] < last["epoch"] else []


def losses(kill: Kill, training: Training, before: int) -> list[str]:
    """Compare what a kill left with the epochs that the checkpoint ``before`` it held."""
    checks = {
        f"damage: {kill.damage}": not kill.damage,
        f"results.csv holds {training.logged()}": training.logged() == list(range(1, kill.logged + 1)),
        f"epoch {kill.logged} was logged, but the checkpoint holds {kill.saved}": kill.saved >= kill.logged - 1,
        f"the checkpoint went back from {before} to {kill.saved} epochs": kill.saved >= before,
        f"{before} epochs were saved, but it went on from {kill.resumed_from}": kill.resumed_from in (None, before + 1),
    }
    return [fault for fault, fine in checks.items() if not fine]


def end_faults(training: Training, reference: Training, code: int, before: int) -> list[str]:
    if code:
        return [f"exit code {code}:\n{training.log.read_text()}"]
    load_runner(training.weights, "cpu")
    checks = {
        f"results.csv holds {training.logged()}": training.logged() == list(range(1, training.epochs + 1)),
        "there is no metrics.json": (training.folder / "metrics.json").is_file(),
        f"went on from {training.resumed_from()}": training.resumed_from() in (None, before + 1),
        "results.csv differs from the undisturbed training's": training.task
        == "detect"  # does not repeat its shuffling
        or without_seconds(training.rows()) == without_seconds(reference.rows()),
    }
    return [fault for fault, fine in checks.items() if not fine]


def without_seconds(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def wait(process: "subprocess.Popen[bytes]", until: Callable[[], bool]) -> None:
    while process.poll() is None and not until():
        time.sleep(0.001)


if __name__ == "__main__":
    run_app(app)
