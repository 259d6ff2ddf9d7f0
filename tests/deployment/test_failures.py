"""What cannot be exported or opened is told in one error, and nothing is left of it."""

import builtins
import importlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.deployment.conftest import SIZE
from tests.tools.conftest import TOOLS
from visionattn.deployment import load_runner
from visionattn.deployment.export import export
from visionattn.deployment.formats import FORMATS
from visionattn.deployment.info import ModelInfo, as_json
from visionattn.deployment.network import Request, load_network
from visionattn.deployment.quantize import Calibration
from visionattn.deployment.runner import format_of, open_session
from visionattn.errors import ConfigError, ExportError, UnsupportedError, WeightsError

ENGINES = [name for name, form in FORMATS.items() if form.of_hardware]


def refused(kind, match, folder, form="torchscript", calibration=None, **request):
    with pytest.raises(kind, match=match):
        export(Request(**request), form, folder / f"model{FORMATS[form].suffix}", calibration)
    assert not list(folder.iterdir())


class TestRequests:
    def test_an_unknown_format(self, tmp_path):
        with pytest.raises(ConfigError, match=r"format 'onxn'; accepted: .*nearest: onnx"):
            export(Request("test_vit"), "onxn", tmp_path / "m.onnx")

    @pytest.mark.parametrize("size", [(65, 64), (64, 72), (8, 64), (0, 64)])
    def test_a_side_that_is_no_multiple_of_the_stride(self, tiny, tmp_path, size):
        refused(
            ConfigError,
            "both sides must be multiples of the model's stride, 16",
            tmp_path,
            weights=str(tiny),
            size=size,
        )

    def test_a_dynamic_size_that_is_too_small(self, tiny, tmp_path):
        options = {"size": (16, 64), "dynamic": ("size",)}
        refused(ConfigError, "with a dynamic size give at least 32", tmp_path, weights=str(tiny), **options)

    def test_no_batch(self, tiny, tmp_path):
        refused(ConfigError, "got batch 0", tmp_path, weights=str(tiny), batch=0)

    @pytest.mark.parametrize("name", ["no_such_model", "test_vitt"])
    def test_an_unknown_model(self, tmp_path, name):
        refused(ConfigError, name, tmp_path, weights=name)

    @pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors"])
    def test_missing_weights(self, tmp_path, name):
        refused(WeightsError, f"weights not found: .*{name}", tmp_path, weights=str(tmp_path / name))

    @pytest.mark.parametrize("option", [{"features": True}, {"model_kwargs": {"depth": 2}}])
    def test_options_of_timm_for_a_detector(self, tiny, tmp_path, option):
        refused(ConfigError, "is a detector; features and model_kwargs", tmp_path, weights=str(tiny), **option)

    @pytest.mark.parametrize("nms", ["embedded", "free", "peaks"])
    def test_suppression_for_a_classifier(self, classifier, tmp_path, nms):
        refused(ConfigError, f"nms={nms}: .* is no detector", tmp_path, "onnx", weights=str(classifier[1]), nms=nms)

    def test_features_of_a_classifier_of_ours(self, classifier, tmp_path):
        refused(UnsupportedError, "give the name of a timm model", tmp_path, weights=str(classifier[1]), features=True)

    @pytest.mark.parametrize("form", [name for name, form in FORMATS.items() if "int8" not in form.precisions])
    def test_a_precision_that_the_format_lacks(self, tiny, photographs_on_disk, tmp_path, form):
        options = {"form": form, "calibration": Calibration(photographs_on_disk), "weights": str(tiny)}
        refused(UnsupportedError, f"{form} holds fp32, fp16; got int8", tmp_path, precision="int8", **options)

    def test_int8_and_images_belong_together(self, tiny, photographs_on_disk, tmp_path):
        refused(ConfigError, "int8 needs images to calibrate by", tmp_path, "onnx", weights=str(tiny), precision="int8")
        images = Calibration(photographs_on_disk)
        refused(ConfigError, "nothing else does", tmp_path, "onnx", images, weights=str(tiny), precision="fp16")


class TestCapture:
    @pytest.mark.slow
    def test_a_window_of_attention_at_any_size(self, tmp_path):
        options = {"attn_layer": {"name": "gka", "window": 4}, "depth": 1}
        request = Request("vit_lat_tiny_patch16_224", (64, 64), dynamic=("size",), model_kwargs=options)
        path = export(request, "onnx", tmp_path / "m.onnx").path
        images, truth = torch.rand(1, 3, 80, 144), load_network(request).truth
        torch.testing.assert_close(open_session(path)(images)[0], truth(images), rtol=1e-4, atol=1e-4)

    def test_a_flat_vision_transformer_at_any_size(self, tmp_path):
        hint = r"vit_tiny_patch16_224: cannot be captured with dynamic size: .*--model-kwargs dynamic_img_size=true"
        options = {"weights": "vit_tiny_patch16_224", "dynamic": ("size",), "model_kwargs": {"depth": 1}}
        refused(ExportError, hint, tmp_path, "onnx", **options)

    @pytest.mark.slow
    def test_the_hint_helps(self, tmp_path):
        kwargs = {"depth": 1, "dynamic_img_size": True}
        request = Request("vit_tiny_patch16_224", dynamic=("size",), model_kwargs=kwargs)
        done = export(request, "onnx", tmp_path / "m.onnx")
        assert {error.size for error in done.parity.errors} == {(224, 224), (224, 256), (112, 112)}


@pytest.fixture
def without(monkeypatch):
    """Let some packages be missing."""

    def run(*names):
        real, load = builtins.__import__, importlib.import_module

        def fake(name, *arguments, **options):
            if name.partition(".")[0] in names:
                raise ImportError(f"No module named {name!r}")
            return real(name, *arguments, **options)

        def fake_load(name, package=None):
            if name.partition(".")[0] in names:
                raise ImportError(f"No module named {name!r}")
            return load(name, package)

        monkeypatch.setattr(builtins, "__import__", fake)
        monkeypatch.setattr(importlib, "import_module", fake_load)

    return run


class TestPackages:
    @pytest.mark.parametrize(
        ("form", "package", "install"),
        [
            ("onnx", "onnxscript", "pip install 'visionattn[onnx]'"),
            ("onnx", "onnxruntime", "pip install 'visionattn[onnx]'"),
            ("openvino", "openvino", "pip install 'visionattn[openvino]'"),
            ("tensorrt", "tensorrt", "pip install 'tensorrt>=10'"),
            ("tensorrt-rtx", "tensorrt_rtx", "pip install 'visionattn[tensorrt-rtx]'"),
        ],
    )
    def test_one_that_is_missing_is_named(self, tiny, tmp_path, without, form, package, install):
        without(package, f"{package}_bindings")
        refused(UnsupportedError, re.escape(install), tmp_path, form, weights=str(tiny), size=SIZE)

    @pytest.mark.parametrize(
        ("form", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino"), ("tensorrt-rtx", "tensorrt_rtx")]
    )
    def test_one_that_is_missing_is_named_by_the_runner(self, exported, tiny, tmp_path, without, form, package):
        path = engine(tmp_path, form) if form in ENGINES else exported(tiny, form, size=SIZE).path
        without(package, f"{package}_bindings")
        with pytest.raises(UnsupportedError, match="is not installed; pip install"):
            load_runner(path)


def engine(folder, form, plan=b"no engine"):
    """A file with the description of an engine, and nothing that a GPU could run."""
    info = ModelInfo(task="classify", names={0: "a"}, size=(32, 32), stride=16, precision="fp16")
    header = as_json(info.metadata()).encode()
    path = folder / f"model{FORMATS[form].suffix}"
    path.write_bytes(len(header).to_bytes(4, "little") + header + plan)
    return path


class TestOpening:
    @pytest.mark.parametrize("form", FORMATS)
    def test_a_damaged_file(self, tmp_path, form):
        path = tmp_path / f"model{FORMATS[form].suffix}"
        if form == "openvino":
            path.mkdir()
            (path / "model.xml").write_text("<net>")
            (path / "model.bin").write_bytes(b"")
        else:
            path.write_bytes(b"\x08\x00\x00\x00 nothing that means anything")
        with pytest.raises(WeightsError, match=re.escape(str(path))):
            load_runner(path, trust=True)

    @pytest.mark.parametrize("form", [name for name, form in FORMATS.items() if not form.of_hardware])
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
    def test_a_file_that_was_cut_short(self, exported, tiny, tmp_path, form, share):
        good = exported(tiny, form, size=SIZE).path
        path = tmp_path / good.name
        if form == "openvino":
            path.mkdir()
            (path / "model.bin").write_bytes(b"")
            (path / "model.xml").write_bytes(cut(good / "model.xml", share))
        else:
            path.write_bytes(cut(good, share))
        with pytest.raises(WeightsError, match=re.escape(str(path))):
            load_runner(path, trust=True)

    def test_a_folder_of_openvino_without_its_weights(self, exported, tiny, tmp_path):
        good = exported(tiny, "openvino", size=SIZE).path
        path = tmp_path / good.name
        path.mkdir()
        (path / "model.xml").write_bytes((good / "model.xml").read_bytes())
        with pytest.raises(WeightsError, match=re.escape(str(path))):
            load_runner(path)

    @pytest.mark.parametrize("form", FORMATS)
    def test_a_missing_file(self, tmp_path, form):
        with pytest.raises(WeightsError, match="weights not found"):
            load_runner(tmp_path / f"model{FORMATS[form].suffix}", trust=True)

    @pytest.mark.parametrize("form", FORMATS)
    def test_files_that_may_run_code_need_trust(self, exported, tiny, tmp_path, form):
        path = engine(tmp_path, form) if form in ENGINES else exported(tiny, form, size=SIZE).path
        if FORMATS[form].runs_code:
            with pytest.raises(WeightsError, match=r"may run any code; .*--trust-weights"):
                load_runner(path)
            load_runner(path, trust=True)
        elif form not in ENGINES:
            load_runner(path)
        assert FORMATS["pt2"].runs_code

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    def test_an_engine_without_a_gpu(self, tmp_path):
        pytest.importorskip("tensorrt_rtx_bindings")
        path = engine(tmp_path, "tensorrt-rtx")
        with pytest.raises(UnsupportedError, match=r"model\.rtx\.engine: TensorRT-RTX engines need an NVIDIA GPU"):
            load_runner(path)

    def test_an_engine_says_what_to_install(self, tmp_path, without):
        without("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
        for form, gpus in (("tensorrt", "7.5 and newer"), ("tensorrt-rtx", r"GeForce RTX .* not 9\.0")):
            with pytest.raises(UnsupportedError, match=rf"pip install .*Its engines run on .*{gpus}"):
                load_runner(engine(tmp_path, form))

    def test_a_description_of_something_else(self, tmp_path):
        path = tmp_path / "m.engine"
        header = b'{"author": "someone"}'
        path.write_bytes(len(header).to_bytes(4, "little") + header + b"plan")
        with pytest.raises(WeightsError, match=r"m\.engine does not say what it is: got metadata \['author'\]"):
            load_runner(path)

    @pytest.mark.parametrize("form", FORMATS)
    def test_a_name_tells_the_format(self, form):
        assert format_of(Path(f"a/b.c{FORMATS[form].suffix}")) is FORMATS[form]

    @pytest.mark.parametrize("options", [{"threads": 2}, {"provider": "CPUExecutionProvider"}])
    def test_options_of_other_runtimes(self, tmp_path, options):
        with pytest.raises(ConfigError, match="not for engines"):
            load_runner(engine(tmp_path, "tensorrt-rtx"), **options)


def cut(path, share):
    content = path.read_bytes()
    return content[: int(len(content) * share)]


def tool(folder, weights, form, output, **options):
    command = [
        sys.executable,
        TOOLS / "export.py",
        "--weights",
        weights,
        "--format",
        form,
        "--output",
        output,
        "--imgsz",
        64,
    ]
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", [name for name in FORMATS if name != "tensorrt"])
def test_a_full_disk(tiny, tmp_path, form):
    """No file may grow beyond 30 kB, as if the disk were full."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))  # noqa: E731
    output = tmp_path / f"model{FORMATS[form].suffix}"
    process = tool(tmp_path, tiny, form, output, preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert errors.startswith("error: ")
    assert "File too large" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_killed_half_way(tiny, tmp_path, form):
    output = tmp_path / f"model{FORMATS[form].suffix}"
    process = tool(tmp_path, tiny, form, output)
    partial = tmp_path / f".{output.name}.{process.pid}.partial"
    deadline = time.monotonic() + 60
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    (partial / "leftover").write_text("of the killed one")
    process = tool(tmp_path, tiny, form, output)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert load_runner(output).size == (64, 64)
