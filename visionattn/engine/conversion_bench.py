"""The bench of conversions: images, an encoder and its students, what is left of the one in the others, results."""

import io
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from visionattn.atomic import write_json
from visionattn.data import parquet_reader
from visionattn.engine import img_focus
from visionattn.engine.probes import Distance, RidgeHead, collect, nearest_neighbours, overlap, pooled
from visionattn.errors import DataError
from visionattn.record import environment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS_A_BATCH = 33_000
"""Of all images together: about 128 images of 224 pixels."""


class Split:
    """Images (N, 3, H, W) of bytes, and their classes."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def tenth(self) -> "Split":
        """Return every tenth image."""
        return Split(self.images[::10], self.labels[::10])

    @classmethod
    def read(cls, folder: Path | None, split: str, count: int) -> "Split":
        """Read the files of a split; of fewer images, every n-th.

        Raises:
            DataError: there are none, or pyarrow, which reads them, is not installed.
        """
        place = folder or Path(os.environ.get("VISIONATTN_DATA", "")) / "imagenette_128"
        files = sorted(place.glob(f"{split}*.parquet"))
        if not files:
            raise DataError(f"no {split}*.parquet in {place}; give --data, or set VISIONATTN_DATA")
        parquet = parquet_reader(f"{split}*.parquet")
        rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, count).astype(int)] if count else rows

        def decode(row: Any) -> Any:
            encoded = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
            return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))

        with ThreadPoolExecutor() as pool:
            decoded = np.stack(list(pool.map(decode, rows)))
        images = torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()
        return cls(images, torch.tensor([row["label"] for row in rows]).to(DEVICE))


class Judge:
    """Compares students with the teacher on the val split: tokens, a frozen head, probes, saliency."""

    def __init__(self, teacher: Any, decoder: Any, train: Split, val: Split, size: int) -> None:
        self.teacher, self.decoder, self.train, self.val, self.size = teacher, decoder, train, val, size
        self.batch = max(1, (66_000 if DEVICE.type == "cuda" else 4_000) // (size // 14) ** 2)
        self.bank = self.features(teacher, train)
        self.head = RidgeHead(self.bank, train.labels)
        self.tokens = collect(self.forward(teacher), self.batches(val, "teacher, val"))
        features = pooled(self.tokens.float().cpu()).to(DEVICE)
        self.mean = self.tokens.float().mean((0, 1)).to(DEVICE)
        self.answers = self.head.predict(features)
        self.base = {
            "size": size,
            "train_images": len(train.images),
            "val_images": len(val.images),
            "teacher": {
                "frozen_head": self.head.accuracy(features, val.labels),
                "nearest_neighbours": nearest_neighbours(self.bank, train.labels, features, val.labels),
            },
        }

    def prepared(self, images: Tensor) -> Tensor:
        """Return images of bytes as the encoder takes them."""
        sized = F.interpolate(images.to(DEVICE).float(), (self.size, self.size), mode="bilinear", align_corners=False)
        return self.normalised(sized)

    def normalised(self, images: Tensor) -> Tensor:
        """Return images of 0 to 255 with the encoder's mean and deviation."""
        mean, std = (torch.tensor(x, device=DEVICE).view(1, 3, 1, 1) for x in (img_focus.MEAN, img_focus.STD))
        return (images / 255 - mean) / std

    def batches(self, split: Split, title: str) -> Iterator[Tensor]:
        parts = torch.split(split.images, self.batch)
        return (self.prepared(part) for part in tqdm(parts, title, leave=False, disable=not sys.stderr.isatty()))

    def forward(self, model: Any) -> Any:
        def run(images: Tensor) -> Tensor:
            with half():
                return model.forward_features(images)

        return run

    def features(self, model: Any, split: Split) -> Tensor:
        forward = self.forward(model)
        return collect(lambda x: pooled(forward(x).float()), self.batches(split, "train")).float()

    @torch.no_grad()
    def __call__(self, student: Any, probes: bool = False) -> dict[str, float]:
        """Return what is left of the teacher in a student, 0..1."""
        forward, distance, features, saliency = (
            self.forward(student),
            Distance(self.mean),
            list[Tensor](),
            list[Tensor](),
        )
        grid = (self.size // 14,) * 2
        for images, expected in zip(self.batches(self.val, "val"), torch.split(self.tokens, self.batch), strict=True):
            tokens = forward(images).float()
            distance.add(tokens, expected.to(DEVICE))
            features.append(pooled(tokens))
            maps = [self.decoder(x[:, 1:], grid) for x in (tokens, expected.to(DEVICE))]
            saliency.append(torch.stack(maps).cpu())
        found = torch.cat(features)
        pair = torch.cat(saliency, 1).flatten(1)
        row = distance.result() | {
            "frozen_head": self.head.accuracy(found, self.val.labels),
            "agreement": (self.head.predict(found) == self.answers).double().mean().item(),
            "saliency_overlap": overlap(pair[0], pair[1]),
            "saliency_correlation": torch.corrcoef(pair)[0, 1].item(),
        }
        if probes:
            bank = self.features(student, self.train)
            row["ridge"] = RidgeHead(bank, self.train.labels).accuracy(found, self.val.labels)
            row["nearest_neighbours"] = nearest_neighbours(bank, self.train.labels, found, self.val.labels)
        return {key: round(value, 5) for key, value in row.items()}


class Augmented:
    """Random crops and flips of a split, made on the device; a pass has each image about once."""

    def __init__(self, split: Split, judge: Judge, sizes: list[int]) -> None:
        self.images, self.judge, self.sizes = split.images.to(DEVICE), judge, sizes

    def __iter__(self) -> Iterator[Tensor]:
        order, at = torch.randperm(len(self.images)), 0
        while at < len(order):
            size = self.sizes[int(torch.randint(len(self.sizes), ()))]
            count = max(1, TOKENS_A_BATCH // (size // 14) ** 2)
            chosen = order[at : at + count]
            at += count
            yield self.cropped(self.images[chosen.to(DEVICE)], size)

    def cropped(self, images: Tensor, size: int) -> Tensor:
        """Cut a part of 35 to 100 % of each image, of an aspect of 3/4 to 4/3, and mirror every other one."""
        draw = torch.rand(5, len(images)).to(DEVICE)
        area, aspect = 0.35 + 0.65 * draw[0], torch.exp((2 * draw[1] - 1) * np.log(4 / 3))
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        x, y = (2 * draw[2] - 1) * (1 - width), (2 * draw[3] - 1) * (1 - height)
        none, mirror = torch.zeros_like(width), torch.where(draw[4] < 0.5, -1.0, 1.0)
        rows = torch.stack((width * mirror, none, x)), torch.stack((none, height, y))
        grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), [len(images), 3, size, size], align_corners=False)
        cut = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        return self.judge.normalised(cut)


def half() -> AbstractContextManager[Any]:
    """Return the precision of the benchmark: bfloat16 by autocast on a GPU, float32 on the CPU."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")


class Results:
    """Rows in a file, written whole after every one; those of an earlier run of the same conditions are kept."""

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self.path, self.conditions = path, json.loads(json.dumps(conditions))
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["conditions"].keys() != self.conditions.keys() or any(
                before["conditions"][key] != value for key, value in self.conditions.items() if key != "teacher"
            ):
                raise DataError(f"{path} was measured under other conditions; give another --output")
            self.rows = before["rows"]

    def has(self, **keys: Any) -> bool:
        return any(all(row.get(key) == value for key, value in keys.items()) for row in self.rows)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"conditions": self.conditions, "rows": self.rows, "environment": environment()}
        write_json(self.path, content)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
