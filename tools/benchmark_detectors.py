"""Train detectors under one recipe, several at once, and write how well they do.

python tools/benchmark_detectors.py --config configs/detect/aquarium.yaml --model yolo-lat-n --model yolo26n.yaml \\
    --seed 0 --seed 1 --seed 2 --jobs 4 --output results/aquarium_416/league.json
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from visionattn.cli import run
from visionattn.config import DetectConfig, load_config
from visionattn.detection import ablated, narrow_control
from visionattn.engine.benchmark import Benchmark, Run, plan_runs, run_all, write_models
from visionattn.engine.run import write_json
from visionattn.errors import ConfigError
from visionattn.record import environment

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    config: Annotated[Path, typer.Option(help="recipe that all share, see configs/detect/")],
    model: Annotated[list[str], typer.Option(help="name, yaml or weights; repeatable")],
    output: Annotated[Path, typer.Option(help="file of the report as JSON; a table and a picture beside it")],
    control: Annotated[
        list[str] | None, typer.Option(help="a model of Ultralytics made as narrow, as yolo26:0.08; repeatable")
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            help="a model with something else for its attention, as yolo-lat-p:softmax, :conv, :none; repeatable"
        ),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="repeatable; 0 if left out")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="trainings at once")] = 1,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="change a key of the recipe: key.sub=value; repeatable")
    ] = None,
) -> None:
    recipe = load_config(config, overrides or ())
    if not isinstance(recipe, DetectConfig):
        raise ConfigError(f"{config} is of task {recipe.task}; give one of configs/detect/")

    def keep(runs: Sequence[Run]) -> None:
        report = Benchmark(recipe=recipe.model_dump(mode="json"), runs=list(runs))
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, json.loads(report.model_dump_json()) | {"environment": environment()})
        print(f"{len(runs)} done", flush=True)

    made = [*map(narrow_control, control or ()), *map(ablated, ablate or ())]
    models = [*model, *write_models(made, recipe.output / "models")]
    for done in run_all(plan_runs(recipe, models, seed or [0]), jobs, keep):
        score = f"AP {done.scores['ap']:.4f} AP50 {done.scores['ap50']:.4f}" if done.scores else done.reason
        print(f"{Path(done.model).stem:24} seed {done.seed} {(done.parameters or 0) / 1e6:.3f} M  {score}")


if __name__ == "__main__":
    run(app)
