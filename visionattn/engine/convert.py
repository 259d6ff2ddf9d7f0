"""Converting a pretrained classifier or encoder: from a name or a file to a file of the same kind, with a report."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader

from visionattn.atomic import write_json
from visionattn.backbones.classifier import Classifier, create_model, has_fixed_size, load_classifier, save_classifier
from visionattn.conversion import ConversionReport, align, convert, report
from visionattn.data import Unlabelled, unlabelled_images
from visionattn.engine.evaluate import ClassificationReport, evaluate
from visionattn.errors import ConfigError

REPORTED = 32
"""Images that a report looks at."""


@dataclass(frozen=True)
class Plan:
    """What to convert, to what, and how.

    Attributes:
        model: a name of timm, or a ``.safetensors`` of ours with softmax attention.
        to: name of the attention.
        images: as :func:`visionattn.data.unlabelled_images` takes them.
        options: of the attention.
        model_kwargs: of ``timm.create_model``, such as ``pretrained`` or ``checkpoint_path``.
        imgsz: side of the images; 0 for that of the model.
        keep: ``auto``, or indices of the blocks that keep softmax attention.
        budget: blocks of ``auto``.
        center: ``image``, ``constant`` or ``none``: which mean key is subtracted.
        local: side of the convolution over the values.
        refit: fit the output projections in closed form.
        calibration: images to calibrate, refit and choose blocks by.
        blocks: steps of the first stage of the alignment.
        features: steps of the second.
        rates: of both; 0 for the defaults.
        batch: images of a step.
        workers: loader processes.
        seed: of everything random.
        device: to run on.
    """

    model: str
    to: str
    images: str
    options: dict[str, Any] = field(default_factory=dict)
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    imgsz: int = 0
    keep: str | Sequence[int] = ()
    budget: int = 2
    center: str = "image"
    local: int = 0
    refit: bool = False
    calibration: int = 64
    blocks: int = 300
    features: int = 1500
    rates: tuple[float, float] = (0.0, 0.0)
    batch: int = 64
    workers: int = 4
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Converted:
    """A conversion that is done: both models, on the device, and what is left of the teacher in the student."""

    student: nn.Module
    teacher: nn.Module
    report: ConversionReport


def convert_file(plan: Plan, output: Path, *, score_on: str = "", split: str = "val") -> Converted:
    """Convert, align, report and write the file; a run that was stopped goes on with the same plan.

    Args:
        plan: what to do.
        output: file to write, ``.safetensors``. Beside it a folder keeps an unfinished run.
        score_on: data whose top-1 is measured before and after, by a model with the classes of the data.
        split: of that data.

    Raises:
        ConfigError: an option is unknown, or does not fit; the folder beside the output holds another run.
        DataError: there are no such images.
        WeightsError: the file to convert is missing or damaged.
    """
    if output.suffix != ".safetensors":
        raise ConfigError(f"output {output}: give the name of a .safetensors file")
    source = load_source(plan)
    found = unlabelled_images(plan.images)
    if plan.batch > len(found):
        raise ConfigError(f"batch={plan.batch}, but there are {len(found)} images in {plan.images}; lower it")
    folder = _opened(output.with_suffix(".run"), plan)
    teacher = source.model.to(plan.device).eval()
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(plan.seed)).tolist()
    still = Unlabelled(found, create_transform(**source.data_config))
    calibration = [torch.stack([still[i] for i in part]) for part in _parts(chosen[: plan.calibration])]
    student = convert(
        teacher,
        plan.to,
        calibrate=calibration,
        keep_softmax="auto" if plan.keep == "auto" else [int(index) for index in plan.keep],
        budget=plan.budget,
        center_keys={"image": True, "none": False}.get(plan.center, "constant"),
        local=plan.local,
        refit=plan.refit,
        **plan.options,
    )
    teacher.requires_grad_(False)
    loader = _loader(plan, found, source.data_config)
    for stage, steps, rate in zip(("blocks", "features"), (plan.blocks, plan.features), plan.rates, strict=True):
        if steps:
            options: dict[str, Any] = {"stage": stage, "steps": steps, "rate": rate, "seed": plan.seed}
            align(student, teacher, loader, folder=folder, **options)
    made = report(student, teacher, calibration[: max(1, REPORTED // 16)])
    layers: Any = student.attention_layers
    save_classifier(
        student,
        output,
        name=source.name,
        kwargs=source.kwargs,
        classes=source.classes,
        data_config=source.data_config,
        attention_layers=layers,
    )
    if score_on:
        made.metrics |= _scores(plan, source, output, score_on, split)
    shutil.rmtree(folder)
    return Converted(student, teacher, made)


def load_source(plan: Plan) -> Classifier:
    """Return the model to convert, and what is needed to build it again."""
    if plan.model.endswith(".safetensors"):
        return load_classifier(plan.model, options=plan.model_kwargs)
    sized = {"img_size": plan.imgsz} if plan.imgsz and has_fixed_size(plan.model) else {}
    model: Any = create_model(plan.model, sized | plan.model_kwargs)
    start = ("pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")
    kwargs = {key: value for key, value in (sized | plan.model_kwargs).items() if key not in (*start, "num_classes")}
    names = [str(index) for index in range(model.num_classes)]
    config = resolve_model_data_config(model, {"img_size": plan.imgsz} if plan.imgsz else {})
    return Classifier(model, plan.model, kwargs, names, config)


def _opened(folder: Path, plan: Plan) -> Path:
    """Make the folder of a run, or find the one that was begun."""
    asked = json.loads(json.dumps(asdict(plan)))
    file = folder / "plan.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, asked)
        return folder
    begun = json.loads(file.read_text(encoding="utf-8"))
    changed = [f"{key} was {begun.get(key)!r}" for key in asked if asked[key] != begun.get(key)]
    if changed:
        raise ConfigError(
            f"{folder} holds a run that was begun with other options ({'; '.join(changed)}); give those, give another "
            "output, or remove the folder"
        )
    return folder


def _parts(indices: list[int]) -> list[list[int]]:
    return [indices[start : start + 16] for start in range(0, len(indices), 16)]


def _loader(plan: Plan, found: Any, config: dict[str, Any]) -> Any:
    """Batches of cropped and mirrored images, in an order that torch's generator says."""
    augment: dict[str, Any] = {"is_training": True, "scale": (0.35, 1.0), "hflip": 0.5, "color_jitter": None}
    data = Unlabelled(found, create_transform(**config, **augment))
    return DataLoader(data, batch_size=plan.batch, shuffle=True, drop_last=True, num_workers=plan.workers)


def _scores(plan: Plan, source: Classifier, output: Path, data: str, split: str) -> dict[str, float]:
    """Return top-1 before, if the model was a file, and after."""
    found = {}
    files = {"top1 after": str(output)} | ({"top1 before": plan.model} if plan.model.endswith(".safetensors") else {})
    for name, file in files.items():
        scored = evaluate(file, data, split, device=plan.device.removeprefix("cuda:"))
        assert isinstance(scored, ClassificationReport)
        found[name] = scored.scores.top1
    return found
