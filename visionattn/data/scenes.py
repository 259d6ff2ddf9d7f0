"""The embedded detection set ``digits-scenes``: handwritten digits scattered over photographs and textures.

No download, and no glyph or piece of a photograph stands in both splits. The same arguments give the same bytes.
"""

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import yaml
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from tqdm import tqdm

from visionattn.data.coco import coco_form, write_coco
from visionattn.data.digits import load_glyphs

COUNTS = {"train": 1200, "val": 200}
SEED = 0
NAMES = {digit: str(digit) for digit in range(10)}

HEIGHTS = (0.12, 0.38)
"""Smallest and largest height of the upright ink, in fractions of the scene."""
DIGITS = 5
"""Most digits in a scene."""
ANGLE = 20.0
"""Largest rotation to either side, in degrees: 6 and 9 stay apart."""
OVERLAP = 0.08
"""Largest share of a box that another one may cover."""
CLEAR = 0.6
"""Share of each class's glyphs that is used: those most unlike the other classes, which people can read."""
CONTRAST = 65.0
"""Least difference in brightness, of 255, between a digit and most of what is behind it."""
_SUPER = 2  # digits are drawn this much larger, then averaged down
_LUMA = np.array([0.114, 0.587, 0.299], np.float32)  # of BGR

Box = tuple[int, int, int, int]


def make_scenes(folder: Path, size: int = 160, counts: Mapping[str, int] = COUNTS, seed: int = SEED) -> None:
    """Write images, YOLO labels, COCO annotations and ``data.yaml`` below ``folder``.

    Args:
        folder: where ``images/<split>``, ``labels/<split>`` and ``annotations/<split>.json`` go.
        size: side of the square scenes, in pixels.
        counts: scenes a split.
        seed: another seed gives other scenes of the same glyphs.
    """
    for split_index, (split, count) in enumerate(counts.items()):
        images, labels, annotations = folder / "images" / split, folder / "labels" / split, folder / "annotations"
        for made in (images, labels, annotations):
            made.mkdir(parents=True, exist_ok=True)
        photos, (glyphs, digits) = _photos(split), _clear_glyphs(split)
        records = []
        for number in tqdm(range(count), f"making digits-scenes, {split}"):
            rng = default_rng([seed, split_index, number])
            scene, objects = draw_scene(rng, size, photos, glyphs, digits)
            rows = np.array([_yolo(digit, box, size) for digit, box in objects])
            name = f"{number:05d}"
            cv2.imwrite(str(images / f"{name}.jpg"), scene, [cv2.IMWRITE_JPEG_QUALITY, 95])
            np.savetxt(labels / f"{name}.txt", rows, fmt=["%d"] + ["%.6f"] * 4)
            records.append((f"{name}.jpg", (size, size), rows))
        write_coco(coco_form(NAMES, records), annotations / f"{split}.json")
    splits = {split: f"images/{split}" for split in counts}
    (folder / "data.yaml").write_text(yaml.safe_dump({**splits, "names": NAMES}, sort_keys=False), encoding="utf-8")


def draw_scene(
    rng: Generator,
    size: int,
    photos: list[NDArray[np.uint8]],
    glyphs: NDArray[np.float32],
    digits: NDArray[np.int64],
) -> tuple[NDArray[np.uint8], list[tuple[int, Box]]]:
    """Draw one scene.

    Returns:
        BGR image (size, size, 3) and, for each of its 1 to 5 digits, class and box (x1, y1, x2, y2) in pixels.
    """
    scene = (_photo(rng, size, photos) if rng.random() < 0.6 else _texture(rng, size)).astype(np.float32)
    objects: list[tuple[int, Box]] = []
    wanted = int(rng.integers(1, DIGITS + 1))
    for _ in range(20 * wanted):
        if len(objects) == wanted:
            break
        chosen = int(rng.integers(len(glyphs)))
        ink = _ink(rng, glyphs[chosen], size)
        height, width = ink.shape
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        box = (x, y, x + width, y + height)
        patch = scene[y : y + height, x : x + width]
        colour = _colour(rng, patch)
        if colour is not None and all(_cover(box, other) <= OVERLAP for _, other in objects):
            patch += (ink * rng.uniform(0.85, 1))[..., None] * (colour - patch)
            objects.append((int(digits[chosen]), box))
    scene += rng.normal(0, rng.uniform(0, 5), scene.shape)
    return scene.clip(0, 255).astype(np.uint8), objects


def _clear_glyphs(split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the clearest glyphs of a split, sharpened so that thick pens leave the holes open."""
    glyphs, digits = load_glyphs(split)
    from sklearn.metrics import pairwise_distances  # a second of imports that only the makers of sets need

    distance = pairwise_distances(glyphs.reshape(len(glyphs), -1))
    np.fill_diagonal(distance, np.inf)
    same = digits[:, None] == digits
    own, other = (np.sort(np.where(mask, distance, np.inf))[:, :5].mean(1) for mask in (same, ~same))
    clarity = other / own
    clear = np.zeros(len(digits), bool)
    for digit in NAMES:
        members = digits == digit
        clear |= members & (clarity >= np.quantile(clarity[members], 1 - CLEAR))
    padded = np.pad(glyphs[clear], ((0, 0), (1, 1), (1, 1)))
    return np.stack([3 * glyph - 2 * cv2.GaussianBlur(glyph, (0, 0), 1) for glyph in padded]), digits[clear]


def _photos(split: str) -> list[NDArray[np.uint8]]:
    """Return the left three quarters of scikit-learn's photographs for ``train``, the rest for ``val``; BGR."""
    pieces = []
    from sklearn.datasets import load_sample_images  # as above

    for photo in load_sample_images().images:
        seam = photo.shape[1] * 3 // 4
        pieces.append(photo[:, seam:, ::-1] if split == "val" else photo[:, :seam, ::-1])
    return pieces


def _photo(rng: Generator, size: int, photos: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(64, min(photo.shape[:2]) + 1))
    x, y = (int(rng.integers(length - side + 1)) for length in (photo.shape[1], photo.shape[0]))
    crop = photo[y : y + side, x : x + side]
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=method))


def _texture(rng: Generator, size: int) -> NDArray[np.float32]:
    """Blend two colours by noise of several scales, at times with stripes."""
    field = np.zeros((size, size), np.float32)
    for cells in (2, 5, 12, 40):
        noise = rng.random((cells, cells), dtype=np.float32) - 0.5
        field += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC) / cells**0.5
    if rng.random() < 0.4:
        angle, waves = rng.uniform(0, np.pi), rng.uniform(3, 14)
        y, x = np.mgrid[:size, :size].astype(np.float32) / size
        field += 0.3 * np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)))
    low, high = field.min(), field.max()
    blend = ((field - low) / (high - low))[..., None]
    one, two = rng.uniform(20, 235, (2, 3)).astype(np.float32)
    return np.asarray(one * blend + two * (1 - blend))


def _ink(rng: Generator, glyph: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return a glyph enlarged, turned and cut to its ink: opacity (h, w) in 0..1."""
    rows = np.flatnonzero(glyph.max(1) > 0.5)
    height = size * np.exp(rng.uniform(*np.log(HEIGHTS)))
    zoom = _SUPER * height / (rows[-1] - rows[0] + 1)
    turn = cv2.getRotationMatrix2D((4.5, 4.5), rng.uniform(-ANGLE, ANGLE), zoom)
    turn[:, 0] *= rng.uniform(0.85, 1.15)  # slimmer or wider
    side = _SUPER * int(np.ceil(13 * zoom / _SUPER))
    turn[:, 2] = side / 2 - turn[:, :2] @ (4.5, 4.5)
    field = cv2.warpAffine(glyph, turn, (side, side), flags=cv2.INTER_CUBIC)
    edge = ((cv2.GaussianBlur(field, (0, 0), 0.3 * zoom) - 0.4) / 0.2).clip(0, 1)
    ink = cv2.resize(edge, (side // _SUPER, side // _SUPER), interpolation=cv2.INTER_AREA)
    ys, xs = np.nonzero(ink > 0.5)
    return np.asarray(ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])


def _colour(rng: Generator, patch: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Return a colour that stands out from nearly all of a piece of a scene, if one was found."""
    colours = np.vstack([rng.uniform(0, 255, (24, 3)), np.zeros(3), np.full(3, 255)]).astype(np.float32)
    alike = np.abs((patch @ _LUMA).reshape(-1, 1) - colours @ _LUMA) < CONTRAST
    distinct = colours[alike.mean(0) < 0.15]
    return distinct[0] if len(distinct) else None


def _cover(a: Box, b: Box) -> float:
    """Return the largest share of either box that the other covers."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))
    return max(width, 0) * max(height, 0) / smaller


def _yolo(digit: int, box: Box, size: int) -> tuple[float, ...]:
    x1, y1, x2, y2 = (edge / size for edge in box)
    return digit, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
