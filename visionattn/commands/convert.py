"""Turn a pretrained vision transformer linear, without labels.

visionattn convert --model vit_small_patch14_dinov2 --model-kwargs pretrained=true --to ela_hadamard \\
    --images photographs/ --output student.safetensors
visionattn convert --model runs/classify/digits/weights/best.safetensors --to ela_hadamard \\
    --images digits --blocks 60 --features 150 --score-on digits --output student.safetensors

The file goes wherever weights go: visionattn evaluate, export, predict and train, and
timm.create_model("visionattn", file="student.safetensors"). A run that was stopped goes on with the same command.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console

from visionattn.cli import Command, size_of
from visionattn.errors import ConfigError

if TYPE_CHECKING:
    from visionattn.engine.convert import Plan

app = typer.Typer(add_completion=False)


@app.command(cls=Command, help=__doc__)
def main(
    model: Annotated[str, typer.Option(help="a model of timm, or a .safetensors of ours, with softmax attention")],
    to: Annotated[str, typer.Option(help="an attention such as ela_hadamard; a wrong name lists them all")],
    images: Annotated[str, typer.Option(help="a folder, a data set, an embedded set, or FILE.parquet or a pattern")],
    output: Annotated[Path, typer.Option(help="file to write, .safetensors")],
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the attention; repeatable")] = None,
    model_kwargs: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of timm.create_model, such as pretrained=true; repeatable")
    ] = None,
    imgsz: Annotated[int, typer.Option(help="side of the images in pixels; that of the model if left out")] = 0,
    keep: Annotated[str, typer.Option(help="blocks that keep softmax attention: auto, or indices such as 8,9")] = "",
    budget: Annotated[int, typer.Option(help="blocks that --keep auto keeps")] = 2,
    budget_ms: Annotated[float, typer.Option(help="or as many as one image may take milliseconds")] = 0.0,
    center: Annotated[str, typer.Option(help="mean key to subtract: image, constant or none")] = "image",
    local: Annotated[int, typer.Option(help="side of a convolution over the values; 0 for none")] = 0,
    refit: Annotated[bool, typer.Option("--refit", help="fit the output projections in closed form first")] = False,
    calibration: Annotated[int, typer.Option(help="images to calibrate by; with --refit 128 and more")] = 64,
    blocks: Annotated[int, typer.Option(help="steps of alignment by blocks; 0 for none")] = 300,
    features: Annotated[int, typer.Option(help="steps of alignment by final tokens; 0 for none")] = 1500,
    rate_blocks: Annotated[float, typer.Option(help="of the first stage; 0 for the usual")] = 0.0,
    rate_features: Annotated[float, typer.Option(help="of the second stage; 0 for the usual")] = 0.0,
    batch: Annotated[int, typer.Option(help="images of a step")] = 64,
    workers: Annotated[int, typer.Option(help="loader processes")] = 4,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; the best there is if left out")] = "",
    score_on: Annotated[str, typer.Option(help="data to measure top-1 on, before and after")] = "",
    sizes: Annotated[str, typer.Option(help="sides at which both models are timed, such as 224,448,896")] = "",
    report: Annotated[Path | None, typer.Option(help="write the report as JSON")] = None,
) -> None:
    import torch

    from visionattn.engine.convert import Plan, convert_file
    from visionattn.profiling.crossover import measure_crossover

    if center not in ("image", "constant", "none"):
        raise ConfigError(f"--center {center}; accepted: image, constant, none")
    plan = Plan(
        model=model,
        to=to,
        images=images,
        options=pairs_of("--option", option or []),
        model_kwargs=pairs_of("--model-kwargs", model_kwargs or []),
        imgsz=imgsz,
        keep=blocks_of(keep),
        budget=budget,
        center=center,
        local=local,
        refit=refit,
        calibration=calibration,
        blocks=blocks,
        features=features,
        rates=(rate_blocks, rate_features),
        batch=batch,
        workers=workers,
        seed=seed,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    if budget_ms:
        plan = replace(plan, budget=blocks_in(budget_ms, plan))
    timed = [size_of(side) or (0, 0) for side in sizes.split(",") if side]
    done = convert_file(plan, output, score_on=score_on)
    made = done.report
    made.speeds = measure_crossover(done.student, done.teacher, timed)
    Console().print(made)
    print(f"written: {output}")
    if report:
        made.save(report)
        print(f"written: {report}")


def blocks_in(milliseconds: float, plan: "Plan") -> int:
    """Return how many blocks may keep softmax attention in a time, by timing the model with all and with none."""
    from visionattn.conversion import convert
    from visionattn.engine.convert import load_source
    from visionattn.profiling.crossover import blocks_within, measure_crossover

    source = load_source(plan)
    teacher = source.model.to(plan.device)
    student: Any = convert(teacher, plan.to, local=plan.local, **plan.options)
    height, width = source.data_config["input_size"][-2:]
    (speed,) = measure_crossover(student, teacher, [(height, width)])
    return blocks_within(milliseconds, speed, len(student.attention_layers))


def blocks_of(text: str) -> str | list[int]:
    """Read indices of blocks, or ``auto``."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if parts == ["auto"]:
        return "auto"
    if not all(part.removeprefix("-").isdigit() for part in parts):
        raise ConfigError(f"--keep {text}; give auto, or indices of blocks such as 8,9")
    return [int(part) for part in parts]


def pairs_of(option: str, texts: list[str]) -> dict[str, Any]:
    """Read KEY=VALUE, the values as YAML."""
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"{option} {text}: expected KEY=VALUE, e.g. features=128")
    return {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in texts)}
