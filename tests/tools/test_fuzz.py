"""Whatever stands in a configuration, a data.yaml or an option, the answer is a result or one error, no traceback."""

import datetime
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.conftest import save_image
from visionattn.config import ClassifyConfig, DetectConfig, TimmOptions, load_config
from visionattn.data import load_detection_data
from visionattn.data.detection import check_data
from visionattn.engine.train import train
from visionattn.errors import VisionAttnError

FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NUMBERS = [-1, 0, 1, 2, 0.5, 1.5, float("nan"), float("inf")]
TEXTS = ["", " ", "abc", "²", "a/b", "..", "0", "1e3", "${NOT_SET_ANYWHERE}", "\x00", "-", "none", "x.yaml", "a" * 300]
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *TEXTS, "x.pt", datetime.date(2020, 1, 1), b"bytes"])
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=2),
    st.dictionaries(st.sampled_from(["a", "p", "name", 1, None]), SCALARS, max_size=2),
)
ULTRALYTICS = [
    *(
        "optimizer",
        "lr0",
        "momentum",
        "cos_lr",
        "freeze",
        "pretrained",
        "classes",
        "fraction",
        "amp",
        "mosaic",
        "hsv_h",
    ),
    *("degrees", "mixup", "cache", "rect", "multi_scale", "close_mosaic", "nbs", "patience", "box", "warmup_epochs"),
    *("val", "plots", "conf", "iou", "max_det", "half", "dropout", "augment", "split", "save_period", "deterministic"),
    *("cfg", "tracker", "compile", "copy_paste_mode", "auto_augment", "nosuch", "data", "verbose", "profile", "source"),
]
TRANSFORMS = ["HorizontalFlip", "RandomCrop", "Resize", "Rotate", "GaussianBlur", "ToGray", "CoarseDropout", "NoSuch"]
AUGMENT = st.one_of(
    VALUES,
    st.lists(
        st.dictionaries(
            st.sampled_from(TRANSFORMS),
            st.dictionaries(st.sampled_from(["p", "height", "width", "limit", "x"]), SCALARS, max_size=3),
            min_size=1,
            max_size=2,
        ),
        max_size=2,
    ),
)
TIMM = {
    "model": ["attn_layer", "block_fn", "mlp_layer", "depth", "embed_dim", "num_heads", "drop_path_rate", "nosuch"],
    "optimizer": ["opt", "lr", "weight_decay", "momentum", "layer_decay", "betas"],
    "scheduler": ["sched", "warmup_epochs", "warmup_lr", "min_lr", "step_on_epochs", "decay_rate"],
    "mixup": ["mixup_alpha", "cutmix_alpha", "prob", "switch_prob", "label_smoothing"],
    "ema": ["decay", "use_warmup", "device"],
}
ENDLESS = {"epochs", "imgsz", "batch", "workers"}
"""Of them only what is refused is tried: what is accepted would be computed."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures as a detection set, and as class folders."""
    root = tmp_path_factory.mktemp("pictures")
    for split in ("train", "val"):
        for number in range(2):
            save_image(root / "images" / split / f"{number}.png", (64, 64))
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            (root / "labels" / split / f"{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
            save_image(root / "classes" / split / str(number) / "a.png", (32, 32))
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [thing]\n")
    return root


def answers(call: Any, *arguments: Any) -> None:
    """See that a call returns, or refuses in a way that tools print as an error."""
    with suppress(VisionAttnError, OSError):
        call(*arguments)


def trained(config: dict[str, Any], folder: Path) -> None:
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    try:
        answers(lambda: train(load_config(folder / "c.yaml")))
        for run in (folder / "runs").glob("*/*"):
            assert list(run.glob("weights/*")), "a start that fails leaves nothing"
    finally:
        shutil.rmtree(folder / "runs", ignore_errors=True)


@given(
    key=st.sampled_from([*DetectConfig.model_fields, *(f"ultralytics.{key}" for key in ULTRALYTICS)]), data=st.data()
)
@FUZZ
def test_keys_of_a_detector(key: str, data: Any, pictures: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config: dict[str, Any] = {"task": "detect", "model": "yolo-lat-p", "data": str(pictures / "data.yaml"), "epochs": 1}
    config |= {"batch": 2, "imgsz": 64, "device": "cpu", "workers": 0, "ultralytics": {"plots": False, "val": False}}
    changed(config, key, data)
    trained(config, tmp_path)


@given(
    key=st.sampled_from(
        [*ClassifyConfig.model_fields, *TimmOptions.model_fields]
        + [f"timm.{section}.{key}" for section, keys in TIMM.items() for key in keys]
    ),
    data=st.data(),
)
@FUZZ
def test_keys_of_a_classifier(key: str, data: Any, pictures: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config: dict[str, Any] = {"task": "classify", "model": "test_vit", "data": str(pictures / "classes"), "epochs": 1}
    config |= {"batch": 2, "imgsz": 32, "device": "cpu", "workers": 0, "timm": {"optimizer": {"opt": "sgd", "lr": 0.1}}}
    changed(config, key if "." in key or key in ClassifyConfig.model_fields else f"timm.{key}", data)
    trained(config, tmp_path)


def changed(config: dict[str, Any], key: str, data: Any) -> None:
    value = data.draw(AUGMENT if key == "augment" else VALUES)
    if key in ENDLESS and isinstance(value, int | float | str) and value not in (-1, 0.5, 1.5, "abc", ""):
        value = "abc"
    *parents, last = key.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


ENTRIES = st.dictionaries(
    st.sampled_from(["path", "train", "val", "names", "nc", "download", "kpt_shape", None, 1]),
    st.one_of(VALUES, st.sampled_from(["images/train", ["images/train", "images/val"], "list.txt", "images"])),
)


@given(
    changes=ENTRIES,
    text=st.sampled_from(["", "[", "- a\n", "3", "a: &a [*a]", "a: !!python/object:os.system []", "\t"]),
)
@FUZZ
def test_data_yaml(changes: dict[Any, Any], text: str, pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    if not root.exists():
        shutil.copytree(pictures, root)
        (root / "list.txt").write_text("images/train/0.png\n\n")
    good = {"train": "images/train", "val": "images/val", "names": ["thing"]}
    for content in (yaml.safe_dump(good | changes), text, text + yaml.safe_dump(good)):
        (root / "data.yaml").write_text(content)

        def checked() -> None:
            check_data(load_detection_data(str(root / "data.yaml")), ("train", "val"), skip_broken=False)

        answers(checked)


FIELDS = st.sampled_from(
    ["0", "1", "0.5", "-1", "nan", "inf", "1e400", "", "a", "٣", "0.5,", "\x00", "0x1", "1_0", "\ufeff0"]
)


@given(rows=st.lists(st.lists(FIELDS, max_size=8), max_size=3))
@FUZZ
def test_labels(rows: list[list[str]], pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    if not root.exists():
        shutil.copytree(pictures, root)
    (root / "labels/train/0.txt").write_text("\n".join(" ".join(row) for row in rows))
    data = load_detection_data(str(root / "data.yaml"))
    answers(check_data, data, ("train", "val"), True)


OPTIONS = {
    "predict": ["--source", "--weights", "--output", "--conf", "--imgsz", "--device", "--provider"],
    "evaluate": ["--data", "--split", "--weights", "--output", "--batch", "--imgsz", "--device", "--backend"],
    "export": [
        *("--weights", "--format", "--precision", "--output", "--imgsz", "--batch", "--dynamic", "--nms", "--conf"),
        *("--model-kwargs", "--calibrate", "--verify-data", "--split", "--max-size", "--workspace", "--level"),
    ],
    "benchmark_detectors": ["--config", "--output", "--model", "--control", "--ablate", "--seed", "--jobs", "--set"],
}
WORDS = [
    "-1",
    "0",
    "1",
    "1.5",
    "nan",
    "inf",
    "1e400",
    "64",
    "64,96",
    "0,0",
    "cpu",
    "cuda:77",
    "a=b",
    "a:b",
    "yolo26:0",
    "x.json",
]


@pytest.mark.parametrize("name", OPTIONS)
@given(data=st.data())
@settings(FUZZ, max_examples=12)
def test_options_of_tools(name: str, data: Any, call: Any, weights: Path, pictures: Path, monkeypatch: Any) -> None:
    with TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        Path("r.yaml").write_text(yaml.safe_dump({"task": "detect", "model": "yolo-lat-p", "data": "none/data.yaml"}))
        given = {
            "predict": {"--source": pictures / "images/val/0.png", "--weights": weights, "--device": "cpu"},
            "evaluate": {"--data": pictures / "data.yaml", "--weights": weights, "--device": "cpu"},
            "export": {"--weights": "missing.pt"},
            "benchmark_detectors": {"--config": "r.yaml", "--output": "o.json"},
        }[name]
        word = data.draw(st.sampled_from([*WORDS, *(text for text in TEXTS if "\x00" not in text)]))
        given |= {data.draw(st.sampled_from(OPTIONS[name])): word}
        done = call(name, *(part for pair in given.items() for part in pair))
        monkeypatch.chdir("/")
    assert done.returncode in (0, 2)
    assert (done.returncode == 2) == ("error: " in done.stderr or "Usage: " in done.stderr), done.stderr
