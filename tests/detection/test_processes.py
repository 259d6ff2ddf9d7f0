"""Checkpoints and trainings in processes that never heard of us: the traps of living outside Ultralytics."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file

from tests.detection.conftest import FAST, fresh
from visionattn.detection import MODELS, YOLOLAT, load_detector
from visionattn.detection.trainer import LATTrainer
from visionattn.errors import WeightsError


def test_fresh_process_loads_scores_and_trains_without_importing_us(
    checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    done = fresh(
        f"""
import sys
from ultralytics import YOLO
assert not any(name.startswith("visionattn") for name in sys.modules)
model = YOLO({str(checkpoint)!r})
model.val(data={str(tiny_data)!r}, project={str(tmp_path)!r}, **{FAST!r})
model.train(data={str(tiny_data)!r}, epochs=1, save_dir={str(tmp_path / "run")!r}, **{FAST!r})
print("NAMES", model.names)
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "NAMES {0: 'yellow', 1: 'cyan'}" in done.stdout


@pytest.mark.parametrize("imported", [False, True])
def test_restricted_loading_needs_our_import_and_then_works(checkpoint: Path, tmp_path: Path, imported: bool) -> None:
    code = (
        ("import visionattn.detection\n" if imported else "")
        + f"""
from ultralytics import YOLO
print("CLASS", type(YOLO({str(checkpoint)!r}).model).__name__)
"""
    )
    done = fresh(code, tmp_path, ULTRALYTICS_SAFE_LOAD="1")
    assert (done.returncode == 0) == imported, done.stderr
    assert ("CLASS DetectionModel" in done.stdout) == imported


@pytest.mark.parametrize("start", [YOLO, YOLOLAT])
def test_multi_gpu_worker_knows_the_blocks(start: type[YOLO], tiny_data: Path, tmp_path: Path) -> None:
    model = start(MODELS["yolo-lat-n"])
    arguments = {**model.overrides, "data": str(tiny_data), "epochs": 1, "save_dir": str(tmp_path / "run"), **FAST}
    trainer = model._smart_load("trainer")(overrides=arguments, _callbacks=model.callbacks)
    assert isinstance(trainer, LATTrainer) == (start is YOLOLAT)
    assert isinstance(trainer.model, str), "the worker parses the yaml again"
    script = generate_ddp_file(trainer)
    try:
        done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    finally:
        ddp_cleanup(trainer, script)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "weights" / "last.pt").exists()


def test_loads_our_checkpoint_restricted(checkpoint: Path) -> None:
    assert load_detector(checkpoint).names == {0: "yellow", 1: "cyan"}


class Payload:
    """Harmless stand-in for an attack: unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    mark = tmp_path / "ran"
    torch.save({**content, "extra": Payload(mark)}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match=r"evil\.pt asks for code.*--trust-weights"):
        load_detector(tmp_path / "evil.pt")
    assert not mark.exists()
    load_detector(tmp_path / "evil.pt", trust=True)
    assert mark.exists(), "the payload must be able to run, or the refusal above proves nothing"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "damaged"), (b"not a checkpoint", "damaged"), ("truncated", "damaged"), ("tensor", "no Ultralytics model")],
)
def test_what_is_not_a_checkpoint(checkpoint: Path, tmp_path: Path, content: bytes | str, message: str) -> None:
    path = tmp_path / "weights.pt"
    if content == "truncated":
        path.write_bytes(checkpoint.read_bytes()[:100_000])
    elif content == "tensor":
        torch.save({"model": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load_detector(path)


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not found"):
        load_detector(tmp_path / "none.pt")


def test_yolo_command_knows_our_models(tiny_data: Path, tmp_path: Path) -> None:
    arguments = [f"{key}={value}" for key, value in FAST.items()]
    command = [
        "yolo",
        "train",
        "model=yolo-lat-n.yaml",
        f"data={tiny_data}",
        "epochs=1",
        f"project={tmp_path}",
        "name=run",
    ]
    program = [str(Path(sys.executable).with_name("visionattn")), *command, *arguments]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_detector(tmp_path / "run" / "weights" / "best.pt").names == {0: "yellow", 1: "cyan"}
