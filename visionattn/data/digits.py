"""The embedded classification set ``digits``: scikit-learn's handwritten digits as folders of class folders."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

SIDE = 32
"""Side of an image of the set, in pixels."""


def load_glyphs(split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the glyphs of ``train`` or ``val``.

    The source goes by writer, so the last fifth of every class, which is ``val``, is mostly by hands that ``train``
    has not seen.

    Returns:
        Glyphs (N, 8, 8), ink 1 on paper 0, and their classes (N,).
    """
    from sklearn.datasets import load_digits  # a second of imports that only the makers of sets need

    source = load_digits()
    position = np.empty(len(source.target))
    for digit in range(10):
        members = np.flatnonzero(source.target == digit)
        position[members] = np.linspace(0, 1, len(members), endpoint=False)
    chosen = (position >= 0.8) if split == "val" else (position < 0.8)
    return (source.images[chosen] / 16).astype(np.float32), source.target[chosen].astype(np.int64)


def make_digits(folder: Path) -> None:
    """Write ``<split>/<class>/<number>.png``, 32 x 32 pixels, white ink on black, below ``folder``."""
    for split in ("train", "val"):
        glyphs, digits = load_glyphs(split)
        for number, (glyph, digit) in enumerate(zip(tqdm(glyphs, f"making digits, {split}"), digits, strict=True)):
            target = folder / split / str(digit)
            target.mkdir(parents=True, exist_ok=True)
            smooth = cv2.resize(np.pad(glyph, 1), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
            grey = (smooth.clip(0, 1) * 255).round().astype(np.uint8)
            cv2.imwrite(str(target / f"{number:04d}.png"), cv2.merge([grey] * 3))
