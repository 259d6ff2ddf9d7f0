"""Train detectors under one recipe, several at once, and write how well they do.

python tools/benchmark_detectors.py --config configs/detect/aquarium.yaml --model yolo-lat-n --model yolo26n.yaml \\
    --control yolo26:0.15 --seed 0 --seed 1 --seed 2 --jobs 4 --output results/aquarium_416/league.json

Runs that the report holds already are not done again. Latencies are measured by tools/profiler.py model, in one run for
all; --latency puts its report beside.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from visionattn.atomic import write_json
from visionattn.cli import run
from visionattn.commands.reports import check_output, publish
from visionattn.config import DetectConfig, load_config
from visionattn.detection import ablated, narrow_control
from visionattn.engine.benchmark import (
    Benchmark,
    Run,
    plan_runs,
    read_benchmark,
    recipe_of,
    run_all,
    write_models,
)
from visionattn.errors import ConfigError, VisionAttnError
from visionattn.profiling.latency import LatencyReport, LatencyRow
from visionattn.profiling.plots import save_figure
from visionattn.profiling.tables import Grid
from visionattn.record import environment

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    config: Annotated[Path, typer.Option(help="recipe that all share, see configs/detect/")],
    output: Annotated[Path, typer.Option(help="file of the report as JSON; tables and pictures beside it")],
    model: Annotated[list[str] | None, typer.Option(help="name, yaml or weights; repeatable")] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="a model of Ultralytics made as narrow, as yolo26:0.08; repeatable")
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(help="a model with another attention, as yolo-lat-p:uniform, or :local, :conv, :none; repeatable"),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="repeatable; 0 if left out")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="trainings at once")] = 1,
    latency: Annotated[Path | None, typer.Option(help="report of tools/profiler.py model on the same models")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="change a key of the recipe: key.sub=value; repeatable")
    ] = None,
) -> None:
    check_output(output)
    recipe = load_config(config, overrides or ())
    if not isinstance(recipe, DetectConfig):
        raise ConfigError(f"{config} is of task {recipe.task}; give one of configs/detect/")
    timed = read_latency(latency) if latency else []
    before = read_benchmark(output, recipe)
    if not (model or control or ablate or before.runs):
        raise ConfigError(f"no model to train, and no runs in {output}; give --model, --control or --ablate")
    made = [*map(narrow_control, control or ()), *map(ablated, ablate or ())]
    models = [*(model or ()), *write_models(made, recipe.output / "models")]
    waiting = [entry for entry in plan_runs(recipe, models, seed or [0]) if not before.trained(entry)]
    again = {entry.key for entry in waiting}
    kept = [done for done in before.runs if done.key not in again]

    def report(done: Sequence[Run]) -> Benchmark:
        return Benchmark(recipe=recipe_of(recipe), runs=[*kept, *done])

    def keep(done: Sequence[Run]) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, report(done).model_dump(mode="json") | {"environment": environment()})
        print(f"{len(done)} of {len(waiting)} trained", flush=True)

    whole = report(run_all(waiting, jobs, keep))
    publish("Detectors under one recipe", whole, league_grids(whole.runs, timed), output)
    failed = [done for done in whole.runs if not done.scores]
    if len(failed) < len(whole.runs):
        draw_losses(whole.runs, output.with_name(f"{output.stem}-losses.png"))
        if timed:
            draw_scores(whole.runs, timed, output.with_suffix(".png"))
    if failed:
        raise VisionAttnError(
            f"{len(failed)} of {len(whole.runs)} trainings failed, see {output.with_suffix('.md')}; mend what it says "
            "and give the same command, which trains those again"
        )


def read_latency(path: Path) -> list[LatencyRow]:
    """Return the rows of a latency report that have times."""
    try:
        report = LatencyReport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--latency {path} is no report of tools/profiler.py model") from error
    return [row for row in report.rows if row.forward]


def by_model(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Sort runs with scores by the name of their model, the best mean AP first; those of a model by seed."""
    found: dict[str, list[Run]] = {}
    for done in sorted(runs, key=lambda done: done.seed):
        if done.scores:
            found.setdefault(done.key[0], []).append(done)
    return dict(sorted(found.items(), key=lambda item: -mean(item[1], "ap")))


def mean(runs: Sequence[Run], score: str) -> float:
    """Return the mean of a score over seeds."""
    return statistics.fmean(done.scores[score] for done in runs)


def shown(runs: Sequence[Run], score: str) -> str:
    """Return the mean of a score over seeds, or a dash where the val split has no objects of that size."""
    return "-" if any(done.scores[score] is None for done in runs) else f"{mean(runs, score):.4f}"


def times_of(stem: str, timed: Sequence[LatencyRow]) -> dict[str, float]:
    """Return the fastest forward of a model, in milliseconds, by size, batch, precision and device."""
    best: dict[str, float] = {}
    for row in timed:
        if row.forward and Path(row.model).stem == stem:
            label = f"{row.size[0]} px, batch {row.batch}, {row.precision}, {row.device}"
            best[label] = min(best.get(label, row.forward.median), row.forward.median)
    return best


def conditions(models: Iterable[str], timed: Sequence[LatencyRow]) -> list[str]:
    """Return under which conditions some of the models were timed."""
    return list(dict.fromkeys(label for stem in models for label in times_of(stem, timed)))


def league_grids(runs: Sequence[Run], timed: Sequence[LatencyRow]) -> list[Grid]:
    """Return a table a row a model, and one of what failed."""
    models = by_model(runs)
    labels = conditions(models, timed)
    scores = ("M parameters", "AP", "AP of seeds", "AP50", "AP S", "AP M", "AP L")
    columns = ["model", *scores, *(f"ms, {label}" for label in labels), "trained on"]
    rows = []
    for stem, own in models.items():
        times = times_of(stem, timed)
        rows.append(
            [
                stem,
                f"{(own[0].parameters or 0) / 1e6:.3f}",
                f"{mean(own, 'ap'):.4f}",
                ", ".join(f"{done.scores['ap']:.4f}" for done in own),
                *(shown(own, key) for key in ("ap50", "ap_small", "ap_medium", "ap_large")),
                *(f"{times[label]:.3f}" if label in times else "-" for label in labels),
                ", ".join(sorted({done.device or "-" for done in own})),
            ]
        )
    failed = [[done.key[0], str(done.seed), done.reason] for done in runs if not done.scores]
    grids = [Grid("Average precision on the val split, and the fastest forward", columns, rows)]
    return grids + ([Grid("Failed", ["model", "seed", "reason"], failed)] if failed else [])


def draw_losses(runs: Sequence[Run], path: Path) -> None:
    """Draw training losses over epochs as a PNG, a curve a model: its least seed. Sums compare within a model only."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for stem, own in by_model(runs).items():
        axes.plot(*zip(*own[0].losses, strict=True), label=stem)
    axes.set(xlabel="epoch", ylabel="sum of training losses", yscale="log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    save_figure(figure, path)


def draw_scores(runs: Sequence[Run], timed: Sequence[LatencyRow], path: Path) -> None:
    """Draw AP over latency as a PNG, a panel a condition, a point a model, its area by its parameters."""
    models = by_model(runs)
    labels = conditions(models, timed)
    figure = Figure(figsize=(6 * max(1, len(labels)), 5), layout="constrained")
    for axes, label in zip(figure.subplots(1, max(1, len(labels)), squeeze=False)[0], labels, strict=False):
        for stem, own in models.items():
            time = times_of(stem, timed).get(label)
            if time is not None:
                colour = "tab:blue" if stem.startswith("yolo-lat") else "tab:grey"
                axes.scatter(time, mean(own, "ap"), s=30 * (own[0].parameters or 0) / 1e6 + 10, color=colour)
                axes.annotate(stem, (time, mean(own, "ap")), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", xlabel=f"ms forward, {label}", ylabel="AP50:95, mean of seeds")
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    save_figure(figure, path)


if __name__ == "__main__":
    run(app)
