"""Whether an exported file scores what its weights score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from visionattn.engine.evaluate import ClassificationReport, DetectionReport, evaluate
from visionattn.errors import ConfigError, ParityError

DROP = {"fp32": 0.0005, "fp16": 0.002, "int8": 0.015}
"""How far AP or top-1 may fall, by precision; a rise is not an error."""

Report = DetectionReport | ClassificationReport


def score_check(
    weights: Path, data: str, split: str, imgsz: tuple[int, int] | None, trust: bool, found: list[tuple[Report, Report]]
) -> Callable[[Path], None]:
    """Return a check that scores weights and file by the same evaluator, on the CPU, and compares.

    Args:
        weights: what was exported.
        data: as for :func:`visionattn.engine.evaluate.evaluate`.
        split: split to score.
        imgsz: (H, W) of the input.
        trust: load files that may run any code.
        found: the two reports are appended to it.

    Raises:
        ConfigError: there are no weights to score, but the name of a model.
    """
    if not weights.is_file():
        raise ConfigError(f"{weights} has no trained weights to score; leave --verify-data out")
    options: dict[str, Any] = {"split": split, "device": "cpu", "trust": trust}

    def check(path: Path) -> None:
        own = None if weights.suffix == ".safetensors" else imgsz
        before, after = evaluate(weights, data, imgsz=own, **options), evaluate(path, data, **options)
        found.append((before, after))
        fall, allowed = headline(before) - headline(after), DROP[after.precision]
        if not fall <= allowed:  # nan is not
            raise ParityError(
                f"{path.name} has {headline(after):.4f} on {after.data} {split}, its weights {headline(before):.4f}; "
                f"accepted for {after.precision}: {allowed} less. Nothing was written"
            )

    return check


def headline(report: Report) -> float:
    """Return the AP of a detector, or the top-1 of a classifier."""
    return report.scores.ap if isinstance(report, DetectionReport) else report.scores.top1
