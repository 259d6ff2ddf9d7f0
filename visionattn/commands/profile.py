"""Measure mechanisms, exports and models.

visionattn profile fidelity
visionattn profile parity
visionattn profile engines
visionattn profile model --weights yolo-lat-n-aquarium --weights yolo26n.yaml --runtime onnxruntime
visionattn profile memory --mechanism softmax --mechanism ela_hadamard --imgsz 224 --imgsz 1024 --train
visionattn profile ops --mechanism ela_hadamard --mechanism performer --tokens 1024 --direction both
visionattn profile compare results/ops/before.json results/ops/after.json --only graph
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visionattn.cli import IMGSZ_HELP, Command, size_of
from visionattn.errors import ConfigError, suggest
from visionattn.packaged import DEFAULT_WEIGHTS

if TYPE_CHECKING:
    from visionattn.profiling.entrants import Form
    from visionattn.profiling.runtimes import Arithmetic
    from visionattn.profiling.steps import DType

RUNTIMES_HELP = (
    "torch, torch-compiled, torch-graph, torch-compiled-graph, torch-bf16, torch-channels-last, onnxruntime, "
    "onnxruntime-int8, openvino, openvino-int8"
)
MECHANISMS_HELP = "ela_hadamard, elu, relu, ela_sum, ela_diff, ela_direction, performer, dark, slay, gka"
FORMS_HELP = "eager, compiled, fused"
TOKENS_HELP = "196, 400, 1024, 1600, 4096, 6400, 16384"
"""For the help, which does not import what has them."""

app = typer.Typer(add_completion=False, help=__doc__)


@app.command(cls=Command)
def fidelity(
    output: Annotated[
        Path | None,
        typer.Option(
            help="file of the report as JSON, its tables beside it in Markdown; results/fidelity.json if left out, "
            "nothing if --quick"
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer seeds, sizes and settings: seconds, not minutes")
    ] = False,
) -> None:
    """How true mechanisms are to the kernels that they have or estimate, and to softmax attention.

    Exit code 1 if a known figure is not recovered.
    """
    from visionattn.commands.reports import check_output, publish
    from visionattn.profiling import measure_fidelity
    from visionattn.profiling.tables import fidelity_grids

    path = output or (None if quick else Path("results/fidelity.json"))
    check_output(path)
    report = measure_fidelity(quick)
    publish("Fidelity", report, fidelity_grids(report), path)
    missed = [figure.name for figure in report.figures if not figure.ok]
    if missed:
        print(f"{len(missed)} of {len(report.figures)} known figures are not recovered: {'; '.join(missed)}")
        raise typer.Exit(1)
    print(f"all {len(report.figures)} known figures are recovered")


@app.command(cls=Command)
def parity(
    weights: Annotated[Path, typer.Option(help="a trained yolo-lat-n, whose attention is exchanged")] = Path(
        DEFAULT_WEIGHTS
    ),
    mechanism: Annotated[list[str] | None, typer.Option(help="repeatable; all if left out")] = None,
    workers: Annotated[int, typer.Option(help="processes at a time, each of several GB")] = 1,
    output: Annotated[Path, typer.Option(help="file of the report as JSON")] = Path("results/export/parity.json"),
) -> None:
    """Errors of exported graphs against torch: every mechanism in a ViT and a YOLO-LAT, fp32 and stretched fp16."""
    from visionattn.attention import ATTENTION
    from visionattn.commands.reports import check_output, publish
    from visionattn.profiling import measure_parity
    from visionattn.profiling.tables import parity_grids

    check_output(output)
    report = measure_parity(weights, mechanism or list(ATTENTION), workers=workers)
    publish("Exported graphs against torch", report, parity_grids(report), output)


@app.command(cls=Command)
def engines(
    output: Annotated[Path, typer.Option(help="file of the report as JSON")] = Path("results/export/engines.json"),
) -> None:
    """Engines that TensorRT-RTX builds without a GPU: a ViT with every mechanism, and YOLO-LATs."""
    from visionattn.commands.reports import check_output, publish
    from visionattn.profiling import measure_engines
    from visionattn.profiling.tables import engine_grid

    check_output(output)
    report = measure_engines()
    publish("Engines", report, [engine_grid(report)], output)


@app.command(cls=Command)
def model(
    weights: Annotated[list[str], typer.Option(help="weights, an exported file, a name or a yaml; repeatable")],
    attention: Annotated[list[str] | None, typer.Option(help="attn_layer of a ViT of timm; repeatable")] = None,
    imgsz: Annotated[list[str] | None, typer.Option(help=f"{IMGSZ_HELP}; repeatable")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="images of a batch; repeatable; 1 if left out")] = None,
    runtime: Annotated[
        list[str] | None, typer.Option(help=f"of weights; repeatable; of {RUNTIMES_HELP}; all if left out")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU if there is one, if left out")] = "",
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, bf16 or bf16-autocast (weights stay in fp32): of torch on a GPU")
    ] = "fp32",
    train: Annotated[bool, typer.Option("--train", help="time a training step of models of timm, too")] = False,
    train_compiled: Annotated[bool, typer.Option("--train-compiled", help="and one of the compiled model")] = False,
    rounds: Annotated[int, typer.Option(help="timings of each")] = 60,
    threads: Annotated[int, typer.Option(help="of the CPU; one a core if left out")] = 0,
    calibrate: Annotated[str, typer.Option(help="data that int8 is calibrated by")] = "",
    trust_weights: Annotated[bool, typer.Option("--trust-weights", help="load files that may run any code")] = False,
    output: Annotated[Path | None, typer.Option(help="file of the report as JSON, tables beside it")] = None,
) -> None:
    """Latency and memory of models, in several runtimes in turns: the bare network, and from picture to result."""
    from visionattn.commands.reports import check_measured, check_output, journal, publish
    from visionattn.data import calibration_images
    from visionattn.deployment.quantize import Calibration
    from visionattn.profiling import Conditions, Sweep, measure_latency
    from visionattn.profiling.steps import AUTOCAST, device_of
    from visionattn.profiling.tables import latency_grids

    check_output(output)
    calibration = Calibration(calibration_images(calibrate, 32), tolerance=math.inf) if calibrate else None
    arithmetic: Arithmetic = "bf16-autocast" if precision == AUTOCAST else known_dtype(precision)
    conditions = Conditions(device_of(device), arithmetic, threads, calibration, trust_weights)
    sweep = Sweep(
        weights, attention or (), runtime or (), sizes_of(imgsz), batch or (1,), train, train_compiled, rounds
    )
    report = measure_latency(sweep, conditions, journal(output))
    publish("Latency", report, latency_grids(report), output)
    check_measured(report.rows)


@app.command(cls=Command)
def memory(
    mechanism: Annotated[
        list[str] | None, typer.Option(help="repeatable; softmax, ela_hadamard, elu, slay and gka if left out")
    ] = None,
    model: Annotated[str, typer.Option(help="a vision transformer of timm")] = "vit_small_patch16_224",
    layer: Annotated[bool, typer.Option("--layer", help="a bare layer of width 384 with 6 heads, not a model")] = False,
    imgsz: Annotated[
        list[str] | None, typer.Option(help="side in pixels, or H,W; repeatable; 224 to 4096 if left out")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="measure a training step, too")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU if there is one, if left out")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16; in training, of autocast")] = "fp32",
    rounds: Annotated[int, typer.Option(help="timings of each")] = 20,
    output: Annotated[
        Path | None, typer.Option(help="file of the report as JSON, tables and a picture (.png) beside it")
    ] = None,
) -> None:
    """Peak memory and time against resolution, for one image and each attention, and how memory grows with tokens."""
    from visionattn.commands.reports import check_measured, check_output, journal, publish
    from visionattn.profiling import MemoryPlan, measure_memory
    from visionattn.profiling.plots import draw_memory
    from visionattn.profiling.steps import device_of
    from visionattn.profiling.tables import memory_grids

    check_output(output)
    plan = MemoryPlan(
        mechanism or ("softmax", "ela_hadamard", "elu", "slay", "gka"),
        sizes_of(imgsz or ["224", "512", "1024", "2048", "4096"]),
        device_of(device),
        "" if layer else model,
        known_dtype(dtype),
        train,
        rounds,
    )
    report = measure_memory(plan, journal(output))
    publish("Memory against resolution", report, memory_grids(report), output)
    if output:
        draw_memory(report, output.with_suffix(".png"))
    check_measured(report.rows)


@app.command(cls=Command)
def ops(
    mechanism: Annotated[list[str] | None, typer.Option(help=f"repeatable; {MECHANISMS_HELP} if left out")] = None,
    forms: Annotated[list[str] | None, typer.Option(help=f"repeatable; of {FORMS_HELP}; all if left out")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help=f"repeatable; {TOKENS_HELP} if left out")] = None,
    total: Annotated[int, typer.Option(help="tokens of a batch in all: the batch is this divided by --tokens")] = 65536,
    batch: Annotated[int, typer.Option(help="items of a batch, in place of --total")] = 0,
    heads: Annotated[int, typer.Option(help="of the attention")] = 6,
    head_dim: Annotated[int, typer.Option(help="width of a head")] = 64,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32")] = "bf16",
    features: Annotated[int, typer.Option(help="random features of performer and dark")] = 256,
    causal: Annotated[bool, typer.Option("--causal", help="each token attends to itself and those before it")] = False,
    direction: Annotated[
        str, typer.Option(help="forward; or both: forward, forward and backward, and their difference")
    ] = "both",
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU if there is one, if left out")] = "",
    rounds: Annotated[int, typer.Option(help="timings of each")] = 60,
    output: Annotated[
        Path | None, typer.Option(help="file of the report as JSON, tables and a picture (.png) beside it")
    ] = None,
) -> None:
    """Time and memory of attention without projections, against softmax by all backends and the device's floor."""
    from visionattn.commands.reports import check_measured, check_output, journal, publish
    from visionattn.profiling import Plan, measure_operations
    from visionattn.profiling.entrants import FORMS
    from visionattn.profiling.operations import MECHANISMS, TOKENS
    from visionattn.profiling.plots import draw_operations
    from visionattn.profiling.steps import device_of
    from visionattn.profiling.tables import operation_grids

    check_output(output)
    if direction not in ("forward", "both"):
        raise ConfigError(f"--direction {direction!r}; {suggest(direction, ('forward', 'both'))}")
    plan = Plan(
        mechanism or MECHANISMS,
        tokens or TOKENS,
        [known_form(name) for name in forms or FORMS],
        direction == "both",
        *(total, batch, heads, head_dim),
        known_dtype(dtype),
        *(features, device_of(device), rounds, causal),
    )
    report = measure_operations(plan, journal(output))
    publish("Attention operations", report, operation_grids(report), output)
    if output:
        draw_operations(report, output.with_suffix(".png"))
    check_measured(report.rows)


@app.command(cls=Command)
def compare(
    a: Annotated[Path, typer.Argument(help="a report as JSON")],
    b: Annotated[Path, typer.Argument(help="another of the same command")],
    only: Annotated[list[str] | None, typer.Option(help="a measurement; repeatable; all if left out")] = None,
    output: Annotated[Path | None, typer.Option(help="file of the comparison as JSON, tables beside it")] = None,
) -> None:
    """Ratios of two reports of ops, model or memory, row by row, and what else differs between them."""
    from visionattn.commands.reports import check_output, publish
    from visionattn.profiling import compare_reports
    from visionattn.profiling.tables import ratio_grids

    check_output(output)
    comparison = compare_reports(a, b, only or ())
    publish(f"{a.name} (A) and {b.name} (B)", comparison, ratio_grids(comparison), output)


def known_form(name: str) -> "Form":
    """Return the form of a mechanism, or raise a ConfigError."""
    from visionattn.profiling.entrants import FORMS

    for form in FORMS:
        if form == name:
            return form
    raise ConfigError(f"--forms {name!r}; {suggest(name, FORMS)}")


def sizes_of(texts: Iterable[str] | None) -> list[tuple[int, int]]:
    """Read sizes (H, W); empty ones are left out."""
    return [size for size in map(size_of, texts or ()) if size]


def known_dtype(name: str) -> "DType":
    """Return the name of a type of arithmetic, or raise a ConfigError."""
    from visionattn.profiling.steps import DTYPES

    for dtype in DTYPES:
        if dtype == name:
            return dtype
    raise ConfigError(f"precision {name!r}; {suggest(name, DTYPES)}")
