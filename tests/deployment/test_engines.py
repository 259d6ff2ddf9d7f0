"""TensorRT-RTX reads and builds our graphs without a GPU; a stub of an engine is driven as the interface demands."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.deployment.conftest import CLASSES, SIZE
from visionattn.attention import ATTENTION
from visionattn.deployment.export import export
from visionattn.deployment.formats import engines
from visionattn.deployment.formats.engines import TENSORRT, TENSORRT_RTX, EngineSession, build
from visionattn.deployment.graph import BuildOptions, Graph
from visionattn.deployment.info import ModelInfo
from visionattn.deployment.network import Request, load_network
from visionattn.errors import ConfigError, ExportError, UnsupportedError

trt = pytest.importorskip("tensorrt_rtx_bindings")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU an engine is run")


@no_gpu
def test_an_engine_is_built_and_said_not_to_have_run(exported, tiny):
    done = exported(tiny, "tensorrt-rtx", size=SIZE, precision="fp16")
    assert done.kept == []
    assert "need an NVIDIA GPU, and there is none here" in done.why
    assert ".partial" not in done.why
    assert done.peak[1] < 65504
    assert 0 < done.parity.worst.relative < 0.01

    content = done.path.read_bytes()
    length = int.from_bytes(content[:4], "little")
    header = json.loads(content[4 : 4 + length])
    assert len(content) - length > 100_000
    own = json.loads(header["visionattn"])
    assert (own["size"], own["precision"], own["opset"], own["task"]) == (list(SIZE), "fp16", 18, "detect")
    assert {int(key): name for key, name in header["names"].items()} == CLASSES
    assert (header["imgsz"], header["stride"], header["task"]) == (list(SIZE), 16, "detect")
    assert (header["runtime"], header["runtime_version"]) == ("TensorRT-RTX", trt.__version__)


@pytest.fixture(scope="module")
def graph(tiny, tmp_path_factory):
    """A graph of which engines are built."""
    network = load_network(Request(str(tiny), SIZE, precision="fp16"))
    made = Graph(network, tmp_path_factory.mktemp("graph"))
    assert made.onnx_file.is_file()
    return made


def building(graph, **options):
    graph.build = BuildOptions(**options)
    return build(TENSORRT_RTX, graph)


def test_layers_and_plan(graph):
    built = building(graph)
    assert built.layers > 100
    assert len(built.plan) > 100_000


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX")
def test_timing_cache_is_written_and_read(graph, tmp_path, monkeypatch):
    cache, read = tmp_path / "timing.cache", []
    building(graph, timing_cache=cache)
    written = cache.read_bytes()
    assert written
    real = engines._timing_cache

    def seen(config, file):
        read.append(file.read_bytes())
        return real(config, file)

    monkeypatch.setattr(engines, "_timing_cache", seen)
    building(graph, timing_cache=cache)
    assert read == [written]
    assert cache.read_bytes()


def test_a_graph_that_it_cannot_read(graph, tmp_path):
    other = Graph(graph.network, tmp_path)
    other.__dict__["onnx_file"] = tmp_path / "graph.onnx"
    other.onnx_file.write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="TensorRT-RTX cannot read the graph of"):
        build(TENSORRT_RTX, other)


def test_the_profile_spans_what_the_description_says():
    shapes = []
    profile = SimpleNamespace(set_shape=lambda *given: shapes.append(given))
    builder = SimpleNamespace(create_optimization_profile=lambda: profile)
    info = ModelInfo(task="detect", names={}, size=(64, 96), batch=2, stride=16)
    for limits in ({"max_batch": 5, "max_size": (160, 128)}, {"max_size": (128, 192)}, {"max_batch": 16}):
        engines._profile(builder, "images", info.updated(**limits))
    assert shapes == [
        ("images", [1, 3, 32, 32], [2, 3, 64, 96], [5, 3, 160, 128]),
        ("images", [2, 3, 32, 32], [2, 3, 64, 96], [2, 3, 128, 192]),
        ("images", [1, 3, 64, 96], [2, 3, 64, 96], [16, 3, 64, 96]),
    ]


@pytest.mark.parametrize("options", [{"level": 6}, {"level": -1}, {"workspace": -1.0}, {"max_batch": 0}])
def test_options_of_a_build_out_of_range(options):
    with pytest.raises(ConfigError, match=r"expected 0\.\.5, 0 or more, 1 or more"):
        BuildOptions(**options)


def test_a_largest_size_below_the_size(tiny, tmp_path):
    request, build = Request(str(tiny), SIZE, dynamic=("size",)), BuildOptions(max_size=(64, 64))
    with pytest.raises(ConfigError, match=r"max_size \(64, 64\) is below the size \(64, 96\)"):
        export(request, "tensorrt-rtx", tmp_path / "m.rtx.engine", build=build)
    assert not list(tmp_path.iterdir())


class TestPackages:
    def test_the_first_that_is_there_is_taken(self):
        assert replace(TENSORRT, modules=("no_such_package", "json")).load() is json

    @pytest.mark.parametrize("runtime", [TENSORRT, TENSORRT_RTX])
    def test_none(self, runtime):
        with pytest.raises(UnsupportedError, match=f"{runtime.name} is not installed; pip install .* run on .*7.5"):
            replace(runtime, modules=("no_such_package",)).load()


class StubContext:
    """Doubles its input into the first output and sums it into the second, at the addresses that it is given."""

    def __init__(self, takes=4, works=True):
        self.takes, self.works, self.addresses, self.shape, self.calls = takes, works, {}, None, []

    def set_input_shape(self, name, shape):
        assert name == "images"
        self.shape = shape
        return shape[0] <= self.takes

    def get_tensor_shape(self, name):
        return self.shape if name == "twice" else (self.shape[0], 1)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        self.calls.append(stream)
        count = torch.Size(self.shape).numel()
        images = at(self.addresses["images"], count).view(self.shape)
        at(self.addresses["twice"], count).copy_((images * 2).flatten())
        at(self.addresses["sum"], self.shape[0]).copy_(images.flatten(1).sum(1))
        return self.works


def at(address, count):
    """Return the float32 numbers at an address."""
    import ctypes

    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)


@pytest.fixture
def stubbed(monkeypatch):
    """Make a session of a stub of an engine, on the CPU."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    modes = {"sum": "out", "images": "in", "twice": "out"}
    mode = SimpleNamespace(INPUT="in", OUTPUT="out")
    package = SimpleNamespace(__name__="tensorrt_rtx_bindings", TensorIOMode=mode, float32="float32")

    def make(context, kind="float32", **more):
        names = list(modes)
        engine = SimpleNamespace(
            create_execution_context=lambda: context,
            num_io_tensors=len(names),
            get_tensor_name=lambda index: names[index],
            get_tensor_mode=modes.__getitem__,
            get_tensor_dtype=lambda name: kind if name == "sum" else "float32",
        )
        options = {"task": "features", "names": {}, "size": (4, 6), "stride": 2, "model": "stub"} | more
        return EngineSession(package, engine, ModelInfo(**options), "cpu", SimpleNamespace(last="out of memory"))

    return make


class TestSession:
    def test_inputs_and_outputs_are_where_the_engine_looks(self, stubbed):
        context = StubContext()
        session = stubbed(context, dynamic=("batch", "size"))
        images = torch.rand(2, 3, 8, 4).transpose(2, 3)  # not contiguous
        sums, twice = session(images)
        torch.testing.assert_close(twice, images * 2)
        torch.testing.assert_close(sums[:, 0], images.flatten(1).sum(1))
        assert context.calls == [7]

    def test_a_fixed_batch_is_filled_and_split(self, stubbed):
        context = StubContext()
        images = torch.rand(5, 3, 4, 6)
        _, twice = stubbed(context, batch=2)(images)
        torch.testing.assert_close(twice, images * 2)
        assert len(context.calls) == 3

    def test_outputs_of_two_calls_are_apart(self, stubbed):
        session = stubbed(StubContext())
        first = session(torch.ones(1, 3, 4, 6))[1]
        session(torch.zeros(1, 3, 4, 6))
        assert (first == 2).all()

    def test_more_than_it_was_built_for(self, stubbed):
        with pytest.raises(
            UnsupportedError, match=r"stub: this engine does not take \(5, 3, 4, 6\); build it for more"
        ):
            stubbed(StubContext(takes=4), dynamic=("batch",))(torch.rand(5, 3, 4, 6))

    def test_an_engine_of_others_that_speaks_float16(self, stubbed):
        with pytest.raises(UnsupportedError, match="stub: sum are not float32"):
            stubbed(StubContext(), kind="float16")

    def test_one_that_does_not_fit_the_memory(self, stubbed):
        with pytest.raises(ExportError, match="stub: the engine cannot be made ready: out of memory"):
            stubbed(None)

    def test_more_images_than_its_largest_batch_are_split(self, stubbed):
        context, images = StubContext(takes=2), torch.rand(5, 3, 4, 6)
        _, twice = stubbed(context, dynamic=("batch",), max_batch=2)(images)
        torch.testing.assert_close(twice, images * 2)
        assert len(context.calls) == 3

    def test_a_run_that_fails_says_why(self, stubbed):
        with pytest.raises(ExportError, match="stub: the engine failed: out of memory"):
            stubbed(StubContext(works=False))(torch.rand(1, 3, 4, 6))


@pytest.mark.slow
@no_gpu
class TestBuilds:
    @pytest.mark.parametrize("name", ["yolo-lat-n", "yolo-lat-s"])
    def test_a_detector(self, tmp_path, name):
        request = Request(name, (320, 320), precision="fp16")
        done = export(request, "tensorrt-rtx", tmp_path / "m.rtx.engine")
        assert done.path.stat().st_size > 1_000_000

    def test_a_detector_of_any_batch_and_size(self, exported, tiny):
        done = exported(tiny, "tensorrt-rtx", size=SIZE, precision="fp16", dynamic=("batch", "size"))
        assert done.path.stat().st_size > 100_000

    @pytest.mark.parametrize("attention", ATTENTION)
    def test_a_vision_transformer_of_every_mechanism(self, tmp_path, attention):
        kwargs = {"attn_layer": attention, "depth": 2}
        request = Request("vit_tiny_patch16_224", precision="fp16", model_kwargs=kwargs)
        done = export(request, "tensorrt-rtx", tmp_path / "m.rtx.engine")
        assert done.path.stat().st_size > 100_000
        assert done.peak[1] < 65504
