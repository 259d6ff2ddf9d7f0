"""Models ready to be timed: weights in a runtime, exported files in their own; checked before they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visionattn.deployment.formats import FORMATS, format_of
from visionattn.deployment.graph import Graph
from visionattn.deployment.info import ModelInfo
from visionattn.deployment.network import Network, Request, load_network
from visionattn.deployment.parity import Parity, errors_of
from visionattn.deployment.quantize import Calibration
from visionattn.deployment.runner import open_session, runner_of
from visionattn.deployment.session import Place, Session, TorchSession
from visionattn.deployment.verify import photographs, piece
from visionattn.errors import ConfigError, ParityError, suggest
from visionattn.profiling.clock import peak_memory
from visionattn.profiling.steps import ACCEPTED, AUTOCAST, DType, TrainingStep
from visionattn.profiling.tuned import TunedSession

RUNTIMES: dict[str, tuple[str, ...]] = {
    "torch": ("cpu", "cuda"),
    "torch-compiled": ("cpu", "cuda"),
    "torch-graph": ("cuda",),
    "torch-compiled-graph": ("cuda",),
    "torch-bf16": ("cpu",),
    "torch-channels-last": ("cpu",),
    "onnxruntime": ("cpu",),
    "onnxruntime-int8": ("cpu",),
    "openvino": ("cpu",),
    "openvino-int8": ("cpu",),
}
"""Runtimes of weights, and where they run. On a GPU, an exported file is run there by its own."""

TRAINING, COMPILED_TRAINING = "torch-train", "torch-train-compiled"
"""Stand in the place of a runtime where a step of training is timed."""

Arithmetic = DType | Literal["bf16-autocast"]
"""Weights and arithmetic of one type; or weights of float32, and what autocast to bfloat16 makes of them."""

PICTURE = (480, 640)
"""(H, W) of the picture that end to end begins with."""


@dataclass(frozen=True)
class Conditions:
    """What all contenders of a run have in common.

    Attributes:
        device: ``cpu`` or a CUDA GPU.
        precision: of torch on a GPU, for inference; on the CPU a runtime says its own.
        threads: of the CPU.
        calibration: images for int8.
        trust: load files that may run any code.

    Raises:
        ConfigError: a precision on the CPU.
    """

    device: torch.device
    precision: Arithmetic = "fp32"
    threads: int = 0
    calibration: Calibration | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        if self.device.type == "cpu" and self.precision != "fp32":
            raise ConfigError(
                f"precision {self.precision} is for torch on a GPU; on the CPU give runtime torch-bf16 or an int8 one"
            )


@dataclass(frozen=True)
class Subject:
    """Weights, a name, a yaml or an exported file, and the attention that a model of timm is built with.

    Attributes:
        weights: as :class:`~visionattn.deployment.network.Request` takes them, or an exported file.
        attention: name of timm's ``attn_layer``; empty for the model's own.
        info: what it is, at its own size.
        parameters: how many; of a detector with batch normalisation folded. None of a file.
    """

    weights: str
    attention: str
    info: ModelInfo
    parameters: int | None

    @property
    def exported(self) -> bool:
        """Whether it is a file of a runtime."""
        return is_exported(self.weights)

    @property
    def runtime(self) -> str:
        """The runtime of an exported file."""
        form = format_of(Path(self.weights))
        name = next(name for name, known in FORMATS.items() if known is form)
        return "onnxruntime" if name == "onnx" else name

    @property
    def trainable(self) -> bool:
        """Whether a step of training can be timed: weights or a name of timm."""
        return self.info.task == "classify" and not self.exported

    def network(self, size: tuple[int, int], batch: int, precision: Any, trust: bool) -> Network:
        """Load it for a size (H, W), a batch and a precision."""
        options = {"attn_layer": self.attention} if self.attention else None
        request = Request(self.weights, size, batch, precision=precision, model_kwargs=options, trust=trust)
        return load_network(request)


@dataclass(frozen=True)
class Candidate:
    """What is timed of a model, and what is known of it before.

    Attributes:
        calls: field of the row that gets the time -> what is timed.
        facts: other fields of the row.
    """

    calls: dict[str, Callable[[int], Any]]
    facts: dict[str, Any]


def is_exported(weights: str) -> bool:
    """Whether a name is that of a file or folder of an export format."""
    return Path(weights).name.endswith((*(form.suffix for form in FORMATS.values()), ".xml"))


def open_subject(weights: str, attention: str, conditions: Conditions) -> Subject:
    """Load a model once, to know its own size and that it is there.

    Raises:
        VisionAttnError: it cannot be loaded, or has no attention to choose.
    """
    if not is_exported(weights):
        options = {"attn_layer": attention} if attention else None
        network = load_network(Request(weights, model_kwargs=options, trust=conditions.trust))
        return Subject(weights, attention, network.info, sum(p.numel() for p in network.truth.parameters()))
    if attention:
        raise ConfigError(f"--attention {attention} is for vision transformers of timm; {weights} is a finished file")
    session = open_session(Path(weights), Place(str(conditions.device), conditions.threads), conditions.trust)
    return Subject(weights, "", session.info, None)


def open_candidate(
    subject: Subject, runtime: str, size: tuple[int, int], batch: int, conditions: Conditions, folder: Path
) -> Candidate:
    """Load, check and run once a model in a runtime.

    Args:
        subject: the model.
        runtime: in :data:`RUNTIMES`, a training, or whatever of an exported file.
        size: (H, W) of the input.
        batch: images of a batch.
        conditions: how.
        folder: for files; it is made.

    Raises:
        ParityError: on a photograph it does not compute what the weights compute in float32 on the CPU.
    """
    if runtime in (TRAINING, COMPILED_TRAINING):
        return _training(subject, size, batch, conditions, runtime == COMPILED_TRAINING)
    if subject.exported:
        return _of_file(subject, size, batch, conditions)
    precision = precision_of(subject, runtime, conditions)
    own = {"bf16": "fp16", AUTOCAST: "fp32"}.get(precision, precision)  # in which it is loaded
    network = subject.network(size, batch, own, conditions.trust)
    expected = outputs_of(network.truth, size, network.info)
    if not runtime.startswith("torch"):
        session = _converted(network, runtime, conditions, folder)
        return _candidate(session, size, batch, precision, expected)
    place = Place(str(conditions.device), conditions.threads)
    torched = TunedSession(network, place, precision, channels_last=runtime in ("torch-bf16", "torch-channels-last"))
    ready = torched.laid(torch.rand(batch, 3, *size))
    if "compiled" in runtime:
        torched.compile()
    if not runtime.endswith("graph"):
        return _candidate(torched, size, batch, precision, expected, ready)
    torched.run(ready)  # compiles it, and sets up libraries
    memory = peak_memory(lambda: torched.capture(ready), conditions.device)
    candidate = _candidate(torched, size, batch, precision, expected, ready)
    return Candidate(candidate.calls | {"forward": torched.replay}, candidate.facts | {"peak_memory": memory})


def precision_of(subject: Subject, runtime: str, conditions: Conditions) -> Any:
    """Return the precision that a model has in a runtime: an :data:`Arithmetic` or ``int8``."""
    if subject.exported:
        return subject.info.precision
    if runtime.endswith("int8"):
        return "int8"
    training = runtime in (TRAINING, COMPILED_TRAINING)
    half = runtime == "torch-bf16" or (training and conditions.device.type == "cuda")
    return "bf16" if half else "fp32" if training else conditions.precision


def outputs_of(truth: nn.Module, size: tuple[int, int], info: ModelInfo) -> list[Tensor]:
    """Return the outputs of a network in float32 on the CPU, of a photograph."""
    with torch.inference_mode():
        outputs = truth(photographs(info, 1, size))
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def check(session: Session, size: tuple[int, int], precision: str, expected: Sequence[Tensor]) -> float | None:
    """Return the relative error of a network on a photograph; None of int8, which is not held against its weights.

    Raises:
        ParityError: it is larger than accepted for the precision, or not finite.
    """
    if precision == "int8":
        return None
    found = session(photographs(session.info, 1, size))
    parity = Parity("fp32", errors_of(list(expected), found, session.info))
    worst = parity.worst
    if not worst.relative <= ACCEPTED[precision]:  # nan is not
        raise ParityError(
            f"not timed: {worst.part} of a photograph differ from those of the weights in float32 by "
            f"{worst.relative:.1e} of the largest; accepted for {precision}: {ACCEPTED[precision]:g}"
        )
    return worst.relative


def _candidate(
    session: Session,
    size: tuple[int, int],
    batch: int,
    precision: str,
    expected: Sequence[Tensor] | None,
    ready: Tensor | None = None,
) -> Candidate:
    """Check a session and run it once each way; ``ready`` is its input, ``expected`` None where nothing is known."""
    images = torch.rand(batch, 3, *size).to(session.place) if ready is None else ready
    error = None if expected is None else check(session, size, precision, expected)
    runner, pictures = runner_of(session, size), [piece(index, PICTURE) for index in range(batch)]
    found = sum(len(getattr(result, "scores", ())) for result in runner(pictures))
    session(images)
    own = isinstance(session, TorchSession)  # of other runtimes' memory torch does not know
    memory = peak_memory(lambda: session(images), torch.device(session.place)) if own else None
    facts = {"error": error, "found": found, "peak_memory": memory}
    return Candidate({"forward": lambda _: session(images), "end_to_end": lambda _: runner(pictures)}, facts)


def _of_file(subject: Subject, size: tuple[int, int], batch: int, conditions: Conditions) -> Candidate:
    """Open an exported file; of raw outputs it is compared with the weights that it names, if they are there."""
    session = open_session(Path(subject.weights), Place(str(conditions.device), conditions.threads), conditions.trust)
    info, expected = session.info, None
    if info.nms == "none" and Path(info.model).is_file():
        network = load_network(Request(info.model, size, trust=conditions.trust))
        expected = outputs_of(network.truth, size, network.info)
    return _candidate(session, size, batch, info.precision, expected)


def _converted(network: Network, runtime: str, conditions: Conditions, folder: Path) -> Session:
    folder.mkdir()
    form = FORMATS["openvino" if runtime.startswith("openvino") else "onnx"]
    path = folder / f"model{form.suffix}"
    form.write(Graph(network, folder, conditions.calibration), path)
    return form.open_session(path, Place("cpu", conditions.threads))


def _training(subject: Subject, size: tuple[int, int], batch: int, conditions: Conditions, compiled: bool) -> Candidate:
    """Make a step of training; on a GPU under autocast to bfloat16. Compiled are forward and backward, not SGD."""
    device = conditions.device
    precision: Any = precision_of(subject, TRAINING, conditions)
    module = subject.network(size, batch, "fp32", conditions.trust).truth.to(device)
    images = torch.rand(batch, 3, *size).to(device)
    if device.type == "cuda":
        module.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    if compiled:
        module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
    labels = torch.arange(batch, device=device) % len(subject.info.names)
    step = TrainingStep(module, images, lambda logits: nn.functional.cross_entropy(logits, labels), precision)
    step.check()
    step()
    return Candidate({"train": step}, {"peak_memory": peak_memory(step, device)})


def known_runtimes(names: Sequence[str], conditions: Conditions) -> list[str]:
    """Return the runtimes of some names, or all that suit the device; int8 needs to be calibrated.

    Raises:
        ConfigError: one is unknown, does not run on the device, or is int8 without calibration.
    """
    kind, int8 = conditions.device.type, conditions.calibration is not None
    suitable = [name for name, kinds in RUNTIMES.items() if kind in kinds]
    for name in names:
        if name not in RUNTIMES:
            raise ConfigError(f"runtime {name!r}; {suggest(name, RUNTIMES)}")
        if name not in suitable:
            raise ConfigError(f"runtime {name} does not run on {kind}; accepted there: {', '.join(suitable)}")
        if name.endswith("int8") and not int8:
            raise ConfigError(f"{name} needs images to calibrate by; give --calibrate DATA, or leave it out")
    return [name for name in suitable if (name in names if names else int8 or "int8" not in name)]
