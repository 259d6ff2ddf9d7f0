"""Whether an exported file scores what its weights score."""

from dataclasses import dataclass

from visionattn.deployment.session import Session
from visionattn.engine.coco import DetectionScores
from visionattn.engine.evaluate import score_session
from visionattn.errors import ParityError

DROP = {"fp32": 0.0005, "fp16": 0.002, "int8": 0.015}
"""How far AP or top-1 may fall, by precision; a rise is not an error."""


@dataclass(frozen=True)
class ScorePair:
    """AP of detectors, top-1 of classifiers, in 0..1: of the weights in float32 and of the file."""

    weights: float
    file: float


def compare_scores(truth: Session, file: Session, data: str, split: str) -> ScorePair:
    """Score weights and file by the same evaluator.

    Args:
        truth: the weights.
        file: the exported file.
        data: as for :func:`visionattn.engine.evaluate.evaluate`.
        split: split to score.

    Raises:
        ParityError: the file scores less than its precision allows.
    """
    pair = ScorePair(_headline(truth, data, split), _headline(file, data, split))
    allowed = DROP[file.info.precision]
    if not pair.weights - pair.file <= allowed:  # nan is not
        raise ParityError(
            f"the file has {pair.file:.4f} on {data} {split}, its weights {pair.weights:.4f}; accepted for "
            f"{file.info.precision}: {allowed} less. Export it in a higher precision"
        )
    return pair


def _headline(session: Session, data: str, split: str) -> float:
    scores = score_session(session, data, split)
    return scores.ap if isinstance(scores, DetectionScores) else scores.top1
