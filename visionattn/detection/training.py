"""Training a detector in a given folder, from the start or from where a killed run stopped."""

import csv
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT, DEFAULT_CFG_KEYS
from ultralytics.utils.torch_utils import select_device

from visionattn.detection.loading import check_head, load_detector, read_checkpoint, restricted
from visionattn.detection.model import MODELS, WEIGHTS, YOLOLAT, resolve_model
from visionattn.detection.trainer import TRAINERS, recover, strip
from visionattn.errors import ConfigError, VisionAttnError, WeightsError, suggest

_OURS = {"task", "mode", "model", "data", "epochs", "batch", "imgsz", "seed", "device", "workers", "augmentations"}
_FOLDERS = {"project", "name", "exist_ok", "save_dir", "resume"}
_WEIGHTS = ("pretrained", "distill_model")
"""Options that may name weights."""
_UNFIT = {"single_cls", "save", "time"}  # classes are scored, every epoch is saved, all epochs are trained


def checked_options(options: dict[str, Any], device: str) -> dict[str, Any]:
    """Refuse options and devices that Ultralytics' trainer would refuse, and those that stand elsewhere in our config.

    Returns:
        The options, with paths in the place of names of weights.

    Raises:
        ConfigError: names the option and, of an unknown key, the nearest known ones.
        WeightsError: an option names weights that are not there.
    """
    known = DEFAULT_CFG_KEYS - _OURS - _FOLDERS - _UNFIT
    for key in options:
        if key in _OURS | _FOLDERS | _UNFIT:
            raise ConfigError(f"ultralytics.{key} cannot be set here; see the top-level keys of the configuration")
        if key not in known:
            raise ConfigError(f"unknown key ultralytics.{key}; {suggest(key, known)}")
    if str(options.get("optimizer", "auto")).lower() == "auto" and {"lr0", "momentum"} & options.keys():
        raise ConfigError(
            "ultralytics.lr0 and momentum are not used with optimizer: auto, which chooses its own; set "
            "ultralytics.optimizer, too, e.g. MuSGD or AdamW, or leave them out"
        )
    if str(options.get("cache")).lower() == "disk":
        raise ConfigError(
            "ultralytics.cache: disk writes NAME.npy beside each picture of the data; take ram, or leave out"
        )
    try:
        get_cfg(DEFAULT_CFG_DICT, {"device": device, **options})
        select_device(device, verbose=False)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(f"Ultralytics refuses an option: {error}") from error
    return options | {key: _weights(key, options[key]) for key in _WEIGHTS if isinstance(options.get(key), str)}


def _weights(key: str, name: str) -> str:
    path = resolve_model(name)
    if not path.endswith(".pt") or not Path(path).is_file():
        named = f", or one of {', '.join(WEIGHTS)}" if WEIGHTS else ""
        raise WeightsError(f"ultralytics.{key}: weights not found: {name}; give a .pt file{named}")
    return path


def check_freeze(detector: YOLOLAT, freeze: Any) -> None:
    """Refuse to freeze layers that a detector does not have, which Ultralytics passes over.

    Raises:
        ConfigError: names the layer and the layers that there are.
    """
    network: Any = detector.model
    asked = freeze if isinstance(freeze, list | tuple) else range(int(freeze or 0))
    known = {name.removeprefix("model.") for name, _ in network.named_parameters()}
    for layer in asked:
        if not any(name.startswith(f"{layer}.") for name in known) and not str(layer).isdigit():
            raise ConfigError(
                f"ultralytics.freeze: got {layer!r}, which names no part with weights, such as 0 or 23.cv2"
            )
        if str(layer).isdigit() and int(layer) >= len(network.model):
            raise ConfigError(f"ultralytics.freeze: got layer {layer}; the layers are 0 to {len(network.model) - 1}")
    frozen = tuple(f"{layer}." for layer in asked)
    if frozen and all(name.startswith(frozen) for name in known):
        raise ConfigError(f"ultralytics.freeze: {freeze} leaves nothing to train; give fewer layers")


def check_side(detector: YOLOLAT, imgsz: int) -> None:
    """Refuse a side that Ultralytics would train at another one in place of.

    Raises:
        ConfigError: it is no multiple of the network's stride, or of 32.
    """
    network: Any = detector.model
    stride = max(int(network.stride.max()), 32)
    if imgsz % stride:
        below = imgsz // stride * stride
        raise ConfigError(
            f"imgsz: got {imgsz}, expected a multiple of {stride}, such as {below or stride} or {below + stride}"
        )


def build_detector(model: str, trust: bool = False) -> YOLOLAT:
    """Build an untrained detector from a name or a yaml, or load ``.pt`` weights to start from.

    Raises:
        ConfigError: no such model, or its yaml is wrong.
        WeightsError: as :func:`visionattn.detection.load_detector`.
    """
    suffix = Path(resolve_model(model)).suffix.lower()
    if suffix == ".pt":
        return load_detector(model, trust)
    if suffix not in (".yaml", ".yml"):
        raise ConfigError(f"model {model!r}; expected one of {', '.join(MODELS)}, a model yaml or a .pt file")
    try:
        with restricted(not trust):
            detector = YOLOLAT(model)
    except VisionAttnError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model {model!r} cannot be built: {error}; give a packaged name, a model yaml or a .pt file"
        ) from error
    if detector.task != "detect" or not isinstance(detector.model, nn.Module):
        raise ConfigError(f"model {model!r} is no detector to train; give a packaged name, a model yaml or a .pt file")
    try:
        check_head(detector)
    except ConfigError as error:
        raise ConfigError(f"model {model!r}: {error}") from error
    return detector


def train_detector(
    detector: YOLOLAT, folder: Path, trust: bool = False, loader: str = "workers", **options: Any
) -> Path:
    """Train ``detector``, or go on with the training that ``folder`` holds; returns the path of the best weights.

    Args:
        detector: what to train if ``folder`` holds no checkpoint yet.
        folder: everything is written here; checkpoints in ``folder/weights``.
        trust: load the checkpoint to go on from as a plain pickle.
        loader: where batches are made, a key of :data:`~visionattn.detection.trainer.TRAINERS`.
        options: Ultralytics' training arguments.
    """
    weights = folder / "weights"
    recover(weights)
    last = weights / "last.pt"
    with restricted(not trust):
        if not last.exists():
            detector.train(trainer=TRAINERS[loader], save_dir=str(folder), **options)
        elif (done := read_checkpoint(last, trust)["epoch"]) == -1 or done + 1 >= options["epochs"]:
            for checkpoint in (last, weights / "best.pt"):
                if read_checkpoint(checkpoint, trust)["epoch"] != -1:
                    strip(checkpoint)
        else:
            _forget_epochs_after(folder / "results.csv", done + 1)
            resumable = {key: options[key] for key in ("data", "device", "workers") if key in options}
            YOLOLAT(last).train(trainer=TRAINERS[loader], resume=True, save_dir=str(folder), **resumable)
    return weights / "best.pt"


def _forget_epochs_after(results: Path, epoch: int) -> None:
    """Drop the row of an epoch that was logged but whose checkpoint was not yet written: it is trained again."""
    with results.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    partial = results.with_name("results.partial.csv")
    with partial.open("w", newline="") as file:
        csv.writer(file).writerows([header, *(row for row in rows if row and int(row[0]) <= epoch)])
    partial.replace(results)
