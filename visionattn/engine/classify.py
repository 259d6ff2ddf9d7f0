"""Training a classifier: a loop of timm's parts on accelerate, which knows devices, mixed precision and torchrun."""

import copy
import csv
import inspect
import io
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import albumentations as A
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from visionattn.atomic import whole, write_text
from visionattn.backbones.classifier import build_classifier, load_classifier, save_classifier
from visionattn.blocks import balance_loss
from visionattn.config import ClassifyConfig
from visionattn.data import ClassificationData, build_augment, check_images, load_classification_data
from visionattn.data.summary import summarize_classification
from visionattn.engine.images import Images, check_input, seed_of
from visionattn.engine.run import RunFolder, is_main_process
from visionattn.errors import ConfigError, VisionAttnError, WeightsError, suggest

_BALANCE = 0.01
"""Weight of the balance loss of mixtures of experts, as in ELA's code; other models have none."""

Row = dict[str, float]
"""What is known of an epoch; a line of ``results.csv``."""


def train_classify(config: ClassifyConfig, run: RunFolder, trust: bool = False) -> dict[str, Any]:
    """Train as ``config`` says in the folder ``run``, or go on with what is there.

    The order of the images and everything random are functions of the seed and the epoch, so that a run which was
    stopped and resumed computes what an uninterrupted one does.

    Args:
        config: what to train.
        run: where to.
        trust: changes nothing here; detectors' files may hold code, classifiers' cannot.

    Returns:
        ``top1`` and ``top5`` in 0..1 and ``loss`` of the best weights on the val split, and how they came about.

    Raises:
        ConfigError: an option or the model is unknown; like the next two, before anything is written.
        DataError: the data set is missing, incomplete or damaged.
        WeightsError: the weights to start from, or those to go on from, cannot be loaded.
    """
    training = _Training(config)
    run.remember(training.data)
    run.create(config)
    last, best = run.weights / "last.pt", run.weights / "best.safetensors"
    if last.exists():
        training.load(last)
        training.publish(best, run.path / "results.csv")
    while len(training.history) < config.epochs:
        training.epoch()
        training.save(last)
        training.publish(best, run.path / "results.csv")
    training.accelerator.wait_for_everyone()
    scores = training.score(load_classifier(best, str(training.accelerator.device)).model)
    training.accelerator.end_training()
    return {
        **scores,
        "epochs": config.epochs,
        "best_epoch": training.best + 1,
        "seconds": round(sum(row["seconds"] for row in training.history), 1),
    }


class _Training:
    """All that a training consists of; making one checks the configuration and the data."""

    def __init__(self, config: ClassifyConfig) -> None:
        _check_names(config)
        augment = A.Compose(build_augment(config.augment or []))
        data = load_classification_data(config.data)
        self.config = config
        self.accelerator = _accelerator(config)
        set_seed(config.seed)
        self.classifier = build_classifier(config.model, data.names, config.imgsz, config.timm.model)
        model = self.classifier.model.to(self.accelerator.device)
        self.ema = _call("ema", ModelEmaV3, model, **config.timm.ema) if config.timm.ema else None
        if config.batch == 1:
            _try_single(self.classifier.model, config.imgsz)
        optimizer = _call("optimizer", create_optimizer_v2, model, **config.timm.optimizer)
        self.mixup, self.loss = _mixup(config, len(data.names))
        train_loader, val_loader = self._loaders(data, augment)
        self.model, self.optimizer, self.train_loader, self.val_loader = self.accelerator.prepare(
            model, optimizer, train_loader, val_loader
        )
        options = {"num_epochs": config.epochs, "updates_per_epoch": len(self.train_loader), **config.timm.scheduler}
        self.scheduler, epochs = _call("scheduler", create_scheduler_v2, optimizer, **options)
        if epochs != config.epochs:
            raise ConfigError(
                f"timm.scheduler: the schedule ends after {epochs} epochs, but epochs is {config.epochs}; set "
                "timm.scheduler.num_epochs such that, with warmup and cooldown, they agree"
            )
        self.history: list[Row] = []

    def _loaders(self, data: ClassificationData, augment: A.Compose) -> tuple[DataLoader[Any], DataLoader[Any]]:
        config, transform = self.config, create_transform(**self.classifier.data_config)
        broken = set(check_images(data, ("train", "val"), config.skip_broken))
        train, val = ([s for s in data.samples(split) if s[0] not in broken] for split in ("train", "val"))
        step = config.batch * self.accelerator.num_processes
        if len(train) < step:
            raise ConfigError(
                f"batch: a step takes {step} images, but {data.name} has {len(train)} to train on; lower it"
            )
        options: dict[str, Any] = {
            "batch_size": config.batch,
            "num_workers": min(config.workers, os.cpu_count() or 1),
            "pin_memory": self.accelerator.device.type == "cuda",
        }
        self.data = summarize_classification(data, {"train": train, "val": val})
        self.images = Images(train, transform, augment, config.seed)
        check_input(self.images, config.imgsz)
        return (
            DataLoader(self.images, shuffle=True, drop_last=True, **options),
            DataLoader(Images(val, transform), **options),
        )

    @property
    def best(self) -> int:
        """Index of the epoch of the highest top-1, the first one of equals."""
        return max(range(len(self.history)), key=lambda epoch: self.history[epoch]["top1"])

    @property
    def _evaluated(self) -> nn.Module:
        return self.ema.module if self.ema else self.accelerator.unwrap_model(self.model)

    @property
    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.accelerator.unwrap_model(self.model),
            "ema": self.ema,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.accelerator.scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def epoch(self) -> None:
        """Train for an epoch, score the result, and note both in the history."""
        epoch, start = len(self.history), time.perf_counter()
        rate = self.optimizer.param_groups[0]["lr"]
        title = f"epoch {epoch + 1}/{self.config.epochs}"
        with tqdm(total=len(self.train_loader), desc=title, disable=not is_main_process()) as bar:
            loss = self._train(epoch, bar)
            if not math.isfinite(loss):
                raise VisionAttnError(
                    f"training diverged in epoch {epoch + 1}: the loss is {loss}; lower "
                    "timm.optimizer.lr or warm up longer"
                )
            scores = self.score(self._evaluated)
            bar.set_postfix(loss=f"{loss:.3f}", top1=f"{scores['top1']:.3f}")
        if self.scheduler:
            self.scheduler.step(epoch + 1, scores["top1"])
        self.history.append(
            {
                "epoch": epoch + 1,
                "train_loss": loss,
                **{f"val_{name}" if name == "loss" else name: score for name, score in scores.items()},
                "lr": rate,
                "seconds": round(time.perf_counter() - start, 2),
            }
        )

    def _train(self, epoch: int, bar: Any) -> float:
        set_seed(seed_of(self.config.seed, epoch), device_specific=True)
        self.train_loader.set_epoch(epoch)
        self.images.epoch = epoch
        self.model.train()
        meter = AverageMeter()
        for step, (images, labels) in enumerate(self.train_loader, epoch * len(self.train_loader) + 1):
            inputs, targets = self.mixup(images, labels) if self.mixup else (images, labels)
            loss = self.loss(self.model(inputs), targets)
            self.accelerator.backward(loss + _BALANCE * balance_loss(self.model))
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema:
                self.ema.update(self.accelerator.unwrap_model(self.model), step=step)
            if self.scheduler:
                self.scheduler.step_update(step)
            meter.update(loss.detach(), len(images))
            bar.update()
        return float(self.accelerator.reduce(meter.avg, "mean"))

    @torch.inference_mode()
    def score(self, model: nn.Module) -> Row:
        """Return ``top1``, ``top5`` and ``loss`` of a model on the val split."""
        model.eval()
        meters = {"top1": AverageMeter(), "top5": AverageMeter(), "loss": AverageMeter()}
        for images, labels in self.val_loader:
            with self.accelerator.autocast():
                logits = model(images)
            logits, labels = self.accelerator.gather_for_metrics((logits.float(), labels))
            top1, top5 = accuracy(logits, labels, topk=(1, 5))
            loss = nn.functional.cross_entropy(logits, labels)
            for meter, value in zip(meters.values(), (top1 / 100, top5 / 100, loss), strict=True):
                meter.update(value, len(labels))
        return {name: float(meter.avg) for name, meter in meters.items()}

    def save(self, path: Path) -> None:
        """Write all that :meth:`load` needs, whole or not at all.

        timm's CheckpointSaver would remove the old file before it moves the new one into place, and has no scheduler.
        """
        if is_main_process():
            state = {name: part.state_dict() for name, part in self._parts.items()}
            content = io.BytesIO()  # torch itself would not say that a disk is full
            torch.save({**state, "history": self.history}, content)
            with whole(path) as partial:
                partial.write_bytes(content.getbuffer())

    def load(self, path: Path) -> None:
        """Go on from a file that :meth:`save` wrote.

        Raises:
            WeightsError: the file is damaged or from another training.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            self.history = state["history"]
        except Exception as error:
            raise WeightsError(
                f"{path} cannot be resumed ({error}); delete the run folder or choose another name, and start again"
            ) from error

    def publish(self, best: Path, results: Path) -> None:
        """Write the last epoch's weights if they are the best so far, and the history.

        This comes after :meth:`save`, and again on resuming, so that a kill between leaves nothing behind.
        """
        if not is_main_process():
            return
        if self.best == len(self.history) - 1:
            it = self.classifier
            save_classifier(
                self._evaluated,
                best,
                name=it.name,
                kwargs=it.kwargs,
                classes=it.classes,
                data_config=it.data_config,
                attention_layers=it.attention_layers,
            )
        table = io.StringIO()
        writer = csv.DictWriter(table, list(self.history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_text(results, table.getvalue())


def _accelerator(config: ClassifyConfig) -> Accelerator:
    device, processes = config.device, int(os.environ.get("WORLD_SIZE", 1))
    if device.isdigit() and processes == 1 and int(device) < torch.cuda.device_count():
        torch.cuda.set_device(int(device))
    elif device not in ("", "cpu"):
        raise ConfigError(
            f"device: got {device!r}, expected cpu, the number of one of the {torch.cuda.device_count()} GPUs here, or "
            "nothing for the best one there is; for two: torchrun --nproc-per-node 2 tools/train.py, without device"
        )
    loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed)
    AcceleratorState._reset_state(reset_partial_state=True)  # another training of this process may have left one
    if config.amp == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
        raise ConfigError("amp: got fp16, which needs a GPU; set bf16 or no")
    try:
        return Accelerator(cpu=device == "cpu", mixed_precision=config.amp, dataloader_config=loading)
    except ValueError as error:
        raise ConfigError(f"device {device!r} with amp {config.amp}: {error}") from error


def _try_single(model: nn.Module, imgsz: int) -> None:
    """Raise a ConfigError if a model cannot be trained on single images, as with batch normalisation of one value."""
    trial = copy.deepcopy(model).cpu().train()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            trial(torch.zeros(1, 3, imgsz, imgsz))
    except ValueError as error:
        raise ConfigError(f"batch: got 1, which this model cannot be trained by ({error}); give 2 or more") from error


def _mixup(config: ClassifyConfig, classes: int) -> tuple[Mixup | None, nn.Module]:
    if not config.timm.mixup:
        return None, nn.CrossEntropyLoss()
    if config.batch % 2:
        raise ConfigError(f"batch: got {config.batch}, but mixup mixes pairs; give an even number")
    mixup = _call("mixup", Mixup, **{"num_classes": classes, **config.timm.mixup})
    if mixup.mix_prob > 0 and mixup.mixup_alpha <= 0 and mixup.cutmix_alpha <= 0:
        raise ConfigError("timm.mixup: mixup_alpha and cutmix_alpha are 0; for label smoothing alone set prob: 0")
    return mixup, SoftTargetCrossEntropy()


def _check_names(config: ClassifyConfig) -> None:
    functions = {"scheduler": create_scheduler_v2, "mixup": Mixup, "ema": ModelEmaV3}
    for section, function in functions.items():
        known = inspect.signature(function).parameters.keys() - {
            "optimizer",
            "model",
            "updates_per_epoch",
            "num_classes",
        }
        for key in getattr(config.timm, section):
            if key not in known:
                raise ConfigError(f"unknown key timm.{section}.{key}; {suggest(key, known)}")


def _call(section: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except Exception as error:  # optimizers refuse what they like
        raise ConfigError(f"timm.{section}: {options}: {error}") from error
