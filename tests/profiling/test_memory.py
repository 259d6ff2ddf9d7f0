import json
import runpy
import sys

import pytest
import torch

from tests.tools.conftest import TOOLS
from visionattn.attention import ATTENTION
from visionattn.attention.elu import EluAttention
from visionattn.errors import ConfigError
from visionattn.profiling import MemoryPlan, MemoryReport, measure_memory, memory
from visionattn.profiling.plots import draw_memory
from visionattn.profiling.tables import memory_grids

CPU = torch.device("cpu")
SIZES = [(64, 64), (32, 32)]


def plan(*mechanisms, device=CPU, **options):
    return MemoryPlan(mechanisms, SIZES, device, **{"model": "test_vit", "rounds": 1, **options})


@pytest.mark.parametrize("model", ["test_vit", ""])
def test_every_mechanism_size_and_step_is_a_row(model):
    report = measure_memory(plan("softmax", "ela_hadamard", model=model, train=True))
    names = [(row.step, row.size, row.mechanism) for row in report.rows]
    sizes, steps = sorted(SIZES), ("inference", "training")
    assert names == [(step, size, name) for step in steps for size in sizes for name in ("softmax", "ela_hadamard")]
    for row in report.rows:
        assert row.reason == ""
        assert row.time.median > 0
        assert (row.peak_memory, row.growth, row.device) == (None, None, "cpu")
        assert row.tokens == row.size[0] * row.size[1] // 256
    assert report.subject == (model or "layer")
    assert MemoryReport.model_validate_json(report.model_dump_json()) == report


def test_half_precision_of_a_layer():
    (row, _) = measure_memory(plan("elu", model="", dtype="bf16")).rows
    assert row.reason == ""


def test_growth_is_the_power_of_tokens(monkeypatch):
    peaks = iter([100, 200, 400, 3200])  # of two mechanisms at 4 and at 16 tokens
    monkeypatch.setattr(memory, "peak_memory", lambda call, device: next(peaks))
    report = measure_memory(plan("softmax", "elu", model=""))
    assert [row.growth for row in report.rows] == [None, None, 1.0, 2.0]
    assert "0.0 (2.00)" in memory_grids(report)[1].markdown()


class Wrong(EluAttention):
    """Differs in half precision."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs) + (x.dtype == torch.bfloat16)


class Hungry(EluAttention):
    """Needs more than there is for more than four tokens."""

    def forward(self, x, *args, **kwargs):
        if x.shape[1] > 4:
            raise torch.OutOfMemoryError("Tried to allocate 1 EiB")
        return super().forward(x, *args, **kwargs)


def test_what_is_wrong_or_too_large_is_a_row_with_a_reason(monkeypatch, tmp_path):
    for cls in (Wrong, Hungry):
        monkeypatch.setitem(ATTENTION, cls.__name__, cls)
    report = measure_memory(plan("elu", "Wrong", "Hungry", model="", dtype="bf16"))
    right, wrong, small, _, _, large = report.rows
    assert right.reason == small.reason == ""
    assert "not timed: the output differs" in wrong.reason
    assert large.reason == "out of memory: Tried to allocate 1 EiB"
    assert wrong.time is large.time is None
    assert "1 EiB" in memory_grids(report)[-1].markdown()
    draw_memory(report, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_bad_wishes():
    with pytest.raises(ConfigError, match="nearest: softmax"):
        plan("softmac")
    with pytest.raises(ConfigError, match="multiples of 16"):
        MemoryPlan(["elu"], [(40, 32)], CPU, model="")
    with pytest.raises(ConfigError, match="scaled"):
        plan("elu", dtype="fp16", train=True)
    with pytest.raises(ConfigError, match="0 rounds"):
        plan("elu", rounds=0)
    with pytest.raises(ConfigError, match="unknown name 'vit_smal'"):
        measure_memory(plan("elu", model="vit_smal"))


def test_the_command_writes_report_tables_and_picture(tmp_path, monkeypatch):
    path = tmp_path / "memory.json"
    arguments = ["memory", "--layer", "--mechanism", "elu", "--imgsz", "32", "--rounds", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["profiler.py", *arguments, "--output", str(path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / "profiler.py"), run_name="__main__")
    assert ended.value.code == 0
    assert json.loads(path.read_text())["rows"][0]["mechanism"] == "elu"
    assert "| elu | inference |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 1000


def test_the_command_names_a_bad_device(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["profiler.py", "memory", "--device", "gpu"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / "profiler.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "device 'gpu' is unknown" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["test_vit", ""])
def test_memory_of_a_gpu(model):
    sizes = [(64, 64), (512, 512)]
    report = measure_memory(
        MemoryPlan(["softmax", "ela_hadamard"], sizes, torch.device("cuda:0"), model, "bf16", True, 2)
    )
    for row in report.rows:
        assert row.reason == ""
        assert row.peak_memory > 0
        assert (row.growth is not None) == (row.size == (512, 512))
