"""What a user does with a model, one function each: train, export, predict. Scoring is the engine's own ``evaluate``.

They are at the top of the package: ``visionattn.train``, ``visionattn.export``, ``visionattn.predict``.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from visionattn.choices import NMS, Dynamic, Precision
from visionattn.config import TrainConfig, load_config, merged, parse_config
from visionattn.data import calibration_images
from visionattn.deployment import export as exporting
from visionattn.deployment import load_runner
from visionattn.deployment.graph import BuildOptions
from visionattn.deployment.network import Request
from visionattn.deployment.nms import Thresholds
from visionattn.deployment.quantize import Calibration
from visionattn.engine.scores import compare_scores
from visionattn.engine.train import TrainResult
from visionattn.engine.train import train as run_training
from visionattn.errors import ConfigError
from visionattn.packaged import DEFAULT_WEIGHTS
from visionattn.video import Summary, open_source
from visionattn.video import predict as run_prediction


def train(
    config: str | Path | TrainConfig | Mapping[str, Any], *, resume: bool = False, trust: bool = False, **changes: Any
) -> TrainResult:
    """Train a detector or a classifier as a configuration says.

    Args:
        config: a YAML file, the name of a packaged one such as ``detect/digits``, its content as a mapping, or what
            :func:`visionattn.config.load_config` returns.
        resume: go on with a run that was stopped; a run that was not begun begins.
        trust: load checkpoints of your own that may run code.
        changes: keys of the configuration and their values in this run, such as ``epochs=10``; a mapping changes only
            the keys it has, such as ``ultralytics={"lr0": 0.01}``.

    Raises:
        ConfigError: a key, a value, the model or the run folder does not fit.
        DataError: the data set is missing, incomplete or damaged.
        WeightsError: the weights to start from cannot be loaded.

    Example:
        >>> result = visionattn.train("detect/digits", epochs=1, name="short")
        >>> result.weights, result.metrics["ap"]
    """
    if isinstance(config, str | Path):
        return run_training(load_config(config, changes=changes), resume, trust)
    content = config if isinstance(config, Mapping) else config.model_dump(mode="json")
    return run_training(parse_config(merged(content, changes)), resume, trust)


def export(
    weights: str | Path,
    format: str = "onnx",
    output: str | Path | None = None,
    *,
    precision: Precision = "fp32",
    imgsz: int | tuple[int, int] | None = None,
    batch: int = 1,
    dynamic: Sequence[Dynamic] = (),
    nms: NMS = "none",
    thresholds: Thresholds | None = None,
    features: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    calibrate: str = "",
    calibration_size: int = 128,
    verify_data: str = "",
    split: str = "val",
    build: BuildOptions | None = None,
    trust: bool = False,
) -> exporting.Exported:
    """Write a model in the format of another runtime, and keep the file only if it computes what the weights compute.

    Args:
        weights: a ``.pt`` detector, a ``.safetensors`` classifier, a name of packaged weights, a model of timm, or a
            model yaml.
        format: a name in :data:`visionattn.deployment.formats.FORMATS`.
        output: file to write; beside the weights, or in ``runs/export`` for what has no file, if left out.
        precision: of the arithmetic; inputs and outputs are float32 whatever it is.
        imgsz: side, or (H, W), of the input in pixels; as trained if left out.
        batch: images of a batch; those to tune for, if it is dynamic.
        dynamic: what a caller of the file may choose: ``batch``, ``size`` or both.
        nms: of a detector: ``none`` (raw predictions), ``embedded`` in the graph, or ``free`` or ``peaks`` by an
            NMS-free head.
        thresholds: of suppression in the graph; only with ``nms="embedded"``.
        features: the feature maps of a model of timm in place of its logits.
        model_kwargs: further arguments of ``timm.create_model``.
        calibrate: data whose train split ``int8`` is calibrated by.
        calibration_size: how many images of it.
        verify_data: data to score weights and file on; for ``int8`` that of ``calibrate`` if left out.
        split: split of ``verify_data``.
        build: how to build an engine.
        trust: load a ``.pt`` that may run any code; for files of your own.

    Raises:
        ConfigError: an option does not fit.
        UnsupportedError: the format cannot hold the model, or a package is missing.
        ExportError: the model cannot be written.
        ParityError: the file computes something else than the weights; nothing was written.

    Example:
        >>> visionattn.export("yolo-lat-p-aquarium", "onnx", dynamic=["batch"]).path
    """
    if nms != "embedded" and thresholds not in (None, Thresholds()):
        raise ConfigError(
            f"conf, iou and max_det are fixed in a file by nms=embedded alone, got nms={nms}; leave them out and give "
            "them where the file is run"
        )
    request = Request(
        weights=str(weights),
        size=(imgsz, imgsz) if isinstance(imgsz, int) else imgsz,
        batch=batch,
        dynamic=tuple(dynamic),
        precision=precision,
        nms=nms,
        thresholds=thresholds or Thresholds(),
        features=features,
        model_kwargs=dict(model_kwargs or {}),
        trust=trust,
    )
    scored_on = verify_data or (calibrate if precision == "int8" else "")
    return exporting.export(
        request,
        format,
        Path(output) if output else None,
        calibration=Calibration(calibration_images(calibrate, calibration_size)) if calibrate else None,
        build=build,
        check=partial(compare_scores, data=scored_on, split=split) if scored_on else None,
    )


def predict(
    source: str | Path,
    weights: str | Path = DEFAULT_WEIGHTS,
    output: str | Path | None = None,
    *,
    show: bool = False,
    conf: float = 0.25,
    imgsz: int | tuple[int, int] | None = None,
    device: str = "",
    trust: bool = False,
    threads: int = 0,
    provider: str = "",
) -> Summary:
    """Run a model on pictures, a video or a camera's stream, and write them with what was found drawn in.

    For boxes and probabilities as numbers see :func:`visionattn.load`.

    Args:
        source: picture, folder, video or gif, camera such as ``0``, or the name of an embedded data set.
        weights: a ``.pt`` detector, a ``.safetensors`` classifier, an exported file, or a name of packaged weights.
        output: folder to write into; a new one in ``runs/predict`` if left out.
        show: also show the frames in a window.
        conf: boxes of a lower score are left out.
        imgsz: side, or (H, W), of the network input in pixels; as trained or exported if left out.
        device: ``cpu``, ``0``, ...; the best there is if left out.
        trust: load a file that may run any code; for files of your own.
        threads: of the CPU; 0 leaves it to the runtime.
        provider: execution provider of ONNX Runtime, or device of OpenVINO; by ``device`` if left out.

    Raises:
        SourceError: the source cannot be read, or the output cannot be written.
        WeightsError: the weights cannot be loaded.
        ConfigError: an option does not fit.

    Example:
        >>> visionattn.predict("pictures/", "yolo-lat-n-aquarium").counts
    """
    opened = open_source(str(source))
    runner = load_runner(weights, device, imgsz, conf, trust=trust, threads=threads, provider=provider)
    folder = Path(output) if output else _free_folder(Path("runs/predict") / opened.name)
    return run_prediction(runner, opened, folder, show)


def _free_folder(wanted: Path) -> Path:
    """Return a folder that is not there yet: the wanted one, or the first with a number from 2 on behind its name."""
    numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))
    return next(folder for folder in chain([wanted], numbered) if not folder.exists())
