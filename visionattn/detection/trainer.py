"""Ultralytics' detection trainer with whole checkpoints after a kill, and no code from data sets; and on the device."""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.modules import Detect
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import strip_optimizer

from visionattn.detection.blocks import has_nms_free_branch
from visionattn.detection.device_loader import DeviceLoader
from visionattn.errors import DataError

SAVE_EVERY = 20.0
"""Seconds between checkpoints of epochs that are not scored."""


class LATTrainer(DetectionTrainer):
    """Trains as Ultralytics does, and never leaves half a checkpoint under its final name."""

    last: Path
    best: Path
    _saved = -math.inf

    def train(self) -> None:
        """Train, in worker processes if there are several devices."""
        if self.ddp:
            self.save_dir = Path(tempfile.mkdtemp())  # Ultralytics removes it before it starts the workers
        super().train()

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Build the network; an NMS-free branch that ``weights`` lack begins as a copy of their other one."""
        network = super().get_model(cfg, weights, verbose)
        source = getattr(weights, "model", [None])[-1]
        if isinstance(source, Detect) and has_nms_free_branch(network.model[-1]) and not has_nms_free_branch(source):
            _copy_branch(network.model[-1])
        return network

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Any:
        """Build a data set and count it: whatever was handed over is in it.

        Raises:
            DataError: Ultralytics leaves images out.
        """
        dataset = super().build_dataset(img_path, mode, batch)
        if dataset.left_out:
            files = ", ".join(dataset.left_out[:3])
            raise DataError(
                f"Ultralytics leaves {len(dataset.left_out)} of the {mode} images out, such as {files}; the data has "
                "changed since it was checked: begin again, with skip_broken to go on without them"
            )
        return dataset

    def save_model(self) -> bool:
        """Save ``last.pt`` and ``best.pt`` under other names, then move them into place.

        Where no epoch is scored, and so none is the best, not more often than every :data:`SAVE_EVERY` seconds: an
        epoch of a small network on a small set is not much longer than saving it.
        """
        scored = self.args.val or self.epoch + 1 >= self.epochs or self.stop
        if not scored and time.monotonic() - self._saved < SAVE_EVERY:
            return False
        self._saved = time.monotonic()
        last, best = self.last, self.best
        self.last, self.best = _beside(last, "partial"), _beside(best, "partial")
        try:
            saved = bool(super().save_model())
            for partial, final in ((self.best, best), (self.last, last)):  # what is resumed from comes last
                if partial.exists():
                    partial.replace(final)
        except OSError as error:
            error.filename = error.filename or str(last)  # a full disk has no name
            raise
        finally:
            for partial in (self.last, self.best):
                partial.unlink(missing_ok=True)
            self.last, self.best = last, best
        return saved

    def final_eval(self) -> None:
        """Strip and score the checkpoints, keeping copies until that is done."""
        with _kept(self.last, self.best):
            super().final_eval()


class DeviceTrainer(LATTrainer):
    """Trains on batches that are made on the device, by :class:`DeviceLoader`."""

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Return our loader for training, Ultralytics' for validation."""
        if mode != "train":
            return super().get_dataloader(dataset_path, batch_size, rank, mode)
        dataset = self.build_dataset(dataset_path, "train", batch_size)
        return DeviceLoader(dataset, batch_size, self.device, self.args, RANK, max(self.world_size, 1))

    def _model_train(self) -> None:
        super()._model_train()
        self.train_loader.epoch = self.epoch


TRAINERS = {"workers": LATTrainer, "device": DeviceTrainer}
"""Trainers by where batches are made."""


def recover(folder: Path) -> None:
    """Put back the copies that a training killed in its last moments left in a run's weights ``folder``."""
    for kept in folder.glob("*.kept.pt"):
        kept.replace(kept.with_name(kept.name.replace(".kept", "")))
    for partial in folder.glob("*.partial.pt"):
        partial.unlink()


def strip(checkpoint: Path) -> None:
    """Reduce a training checkpoint to its weights, atomically."""
    partial = _beside(checkpoint, "partial")
    strip_optimizer(checkpoint, str(partial))
    partial.replace(checkpoint)


def _copy_branch(head: Any) -> None:
    """Make the NMS-free branch a copy of the other where their layers are the same."""
    for name in ("cv2", "cv3"):
        many = getattr(head, name)
        if many.state_dict().keys() == getattr(head, f"one2one_{name}").state_dict().keys():
            setattr(head, f"one2one_{name}", deepcopy(many))


@contextmanager
def _kept(*checkpoints: Path) -> Iterator[None]:
    copies = [(c, _beside(c, "kept")) for c in checkpoints if RANK in {-1, 0} and c.exists()]
    for checkpoint, copy in copies:
        partial = _beside(checkpoint, "partial")
        shutil.copyfile(checkpoint, partial)
        partial.replace(copy)
    yield
    for _, copy in copies:
        copy.unlink()


def _beside(checkpoint: Path, mark: str) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}.{mark}.pt")
