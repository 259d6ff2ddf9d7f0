"""Export a detector, a classifier or a backbone, and verify that the file computes what the weights compute.

visionattn export --weights yolo-lat-n-aquarium --format onnx --precision fp16 --dynamic batch,size
visionattn export --weights vit_lat_tiny_patch16_224 --format openvino --model-kwargs num_classes=10
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from visionattn.choices import NMS, Precision
from visionattn.cli import Command, size_of
from visionattn.errors import ConfigError, suggest

if TYPE_CHECKING:
    from visionattn.deployment.export import Exported

app = typer.Typer(add_completion=False)


@app.command(cls=Command, help=__doc__)
def main(
    weights: Annotated[str, typer.Option(help="a .pt or .safetensors, a name of timm or of ours, or a model yaml")],
    format: Annotated[str, typer.Option(help="onnx, openvino, tensorrt, tensorrt-rtx, torchscript or pt2")] = "onnx",
    precision: Annotated[Precision, typer.Option(help="of the arithmetic; inputs and outputs are float32")] = "fp32",
    output: Annotated[Path | None, typer.Option(help="file to write; beside the weights if left out")] = None,
    imgsz: Annotated[str, typer.Option(help="side of the input in pixels, or H,W; as trained if left out")] = "",
    batch: Annotated[int, typer.Option(help="images of a batch; those to tune for, if it is dynamic")] = 1,
    dynamic: Annotated[str, typer.Option(help="what a caller may choose: batch, size, or batch,size")] = "",
    nms: Annotated[
        NMS,
        typer.Option(
            help="of a detector: none, raw predictions; embedded in the graph; free, by an NMS-free head; "
            "peaks, by both branches of such a head, without NMS"
        ),
    ] = "none",
    conf: Annotated[float, typer.Option(help="fixed in the file by --nms embedded; for AP next to nothing")] = 0.001,
    iou: Annotated[float, typer.Option(help="overlap above which the lower box goes, fixed by --nms embedded")] = 0.7,
    max_det: Annotated[int, typer.Option(help="most boxes of an image, fixed by --nms embedded")] = 300,
    features: Annotated[bool, typer.Option("--features", help="feature maps of a timm model, not logits")] = False,
    model_kwargs: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of timm.create_model, such as dynamic_img_size=true; repeatable")
    ] = None,
    calibrate: Annotated[str, typer.Option(help="data whose train split int8 is calibrated by")] = "",
    calibration_size: Annotated[int, typer.Option(help="how many images of it")] = 128,
    verify_data: Annotated[
        str, typer.Option(help="data to score weights and file on: AP or top-1; for int8 that of --calibrate")
    ] = "",
    split: Annotated[str, typer.Option(help="split of --verify-data")] = "val",
    max_batch: Annotated[int, typer.Option(help="of an engine with a dynamic batch")] = 16,
    max_size: Annotated[str, typer.Option(help="of an engine with a dynamic size: a side, or H,W; twice --imgsz")] = "",
    workspace: Annotated[float, typer.Option(help="GiB that an engine's builder may use; 0 for all")] = 0.0,
    level: Annotated[int, typer.Option(min=0, max=5, help="how long an engine's builder searches")] = 3,
    timing_cache: Annotated[Path | None, typer.Option(help="file of an engine builder's earlier measurements")] = None,
    trust_weights: Annotated[
        bool, typer.Option("--trust-weights", help="load a .pt that may run any code; for files of your own")
    ] = False,
) -> None:
    from visionattn.deployment.graph import BuildOptions
    from visionattn.deployment.nms import Thresholds
    from visionattn.verbs import export

    exported = export(
        weights,
        format,
        output,
        precision=precision,
        imgsz=size_of(imgsz),
        batch=batch,
        dynamic=axes_of(dynamic),
        nms=nms,
        thresholds=Thresholds(conf, iou, max_det),
        features=features,
        model_kwargs=kwargs_of(model_kwargs or []),
        calibrate=calibrate,
        calibration_size=calibration_size,
        verify_data=verify_data,
        split=split,
        build=BuildOptions(
            max_batch=max_batch,
            max_size=size_of(max_size),
            workspace=workspace,
            level=level,
            timing_cache=timing_cache,
        ),
        trust=trust_weights,
    )
    show(exported)
    if exported.checked:
        scores = exported.checked
        print(f"scores on {verify_data or calibrate} {split}: weights {scores.weights:.4f}, file {scores.file:.4f}")
    print(f"written: {exported.path}")


def show(exported: "Exported") -> None:
    """Print what the file is and how far it is from the weights."""
    from visionattn.deployment.info import size_text
    from visionattn.detection import resolve_model

    info, parity = exported.info, exported.parity
    print(f"{info.model}: {info.task}, {info.precision}, at {size_text(info.size)} px, batch {info.batch}")
    if not resolve_model(info.model).endswith((".pt", ".safetensors")):
        print("no weights of yours: it is as its model is made, untrained but for --model-kwargs pretrained=true")
    print(f"dynamic: {', '.join(info.dynamic) or 'nothing'}; nms: {info.nms}; ONNX opset: {info.opset or 'none'}")
    table = Table("output", "batch", "size", "max error", "relative", "rms")
    for error in parity.errors:
        figures = (f"{error.absolute:.2e}", f"{error.relative:.2e}", f"{error.rms:.2e}")
        table.add_row(error.part, str(error.batch), size_text(error.size), *figures)
    Console().print(table)
    kind = "rms" if info.precision == "int8" else "relative"
    largest = parity.measured(parity.worst)
    print(f"largest {kind} error {largest:.2e}, accepted for {info.precision}: {parity.tolerance:g}")
    if exported.peak:
        name, peak = exported.peak
        print(f"largest float16 value on photographs: {peak:.3g} ({name}), of 65504")
    if exported.kept:
        print(f"in float32, being sensitive: {', '.join(exported.kept)}")
    if exported.why:
        print(f"the file was built but NOT RUN here; the graph that it was built of was compared. {exported.why}")
    print(f"{exported.writing:.1f} s to write, {exported.verifying:.1f} s to verify")


def axes_of(text: str) -> tuple[Any, ...]:
    """Read what shall be dynamic."""
    axes = tuple(part.strip() for part in text.split(",") if part.strip())
    for axis in axes:
        if axis not in ("batch", "size"):
            raise ConfigError(f"--dynamic {text}: {axis!r}; {suggest(axis, ('batch', 'size'))}")
    return axes


def kwargs_of(texts: list[str]) -> dict[str, Any]:
    """Read KEY=VALUE, the values as YAML."""
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"--model-kwargs {text}: expected KEY=VALUE, e.g. attn_layer=slay")
    return {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in texts)}
