"""Operations are timed only if they are right, against floors that are those by hand."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from visionattn.attention import ATTENTION
from visionattn.attention.ela_hadamard import ElaHadamardAttention
from visionattn.errors import ConfigError, UnknownNameError
from visionattn.profiling import OperationsReport, Plan, measure_operations, operations
from visionattn.profiling.clock import Milliseconds
from visionattn.profiling.entrants import ExactSoftmax, Shape, entrants, floor_work
from visionattn.profiling.judge import Judge, Verdict
from visionattn.profiling.trials import Trial, difference

TOOL = Path(__file__).parents[2] / "tools" / "profiler.py"
SHAPE = Shape(2, 10, 3, 8, torch.bfloat16, torch.device("cpu"))
TINY = Plan(["ela_hadamard"], [16], ["eager"], total=32, heads=2, head_dim=8, dtype="fp32", rounds=2)


@pytest.fixture(scope="module")
def profiler() -> ModuleType:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("profiler_of_operations", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layer(name: str, **options: int):
    return ATTENTION[name](24, 3, projections=False, **options)


def test_bytes_of_the_floor_by_hand() -> None:
    stream = 2 * 10 * 3 * 8 * 2  # B N H D numbers of two bytes
    bare = layer("ela_hadamard")
    assert [floor_work(bare, SHAPE, way)[0] for way in ("forward", "backward", "training")] == [
        4 * stream,
        7 * stream,
        11 * stream,
    ]
    assert floor_work(layer("gka"), SHAPE, "forward") == (2 * stream, 0)
    assert floor_work(layer("gka"), SHAPE, "backward") == (3 * stream, 0)


def test_operations_of_the_floor_by_hand() -> None:
    tokens, width = 2 * 10, 3 * 8
    assert floor_work(layer("ela_hadamard"), SHAPE, "forward")[1] == tokens * width * 4 * 8
    performer = layer("performer", features=32)
    assert floor_work(performer, SHAPE, "forward")[1] == tokens * width * (4 * 32 + 4 * 32)
    assert floor_work(performer, SHAPE, "backward")[1] == tokens * width * (8 * 32 + 4 * 32)
    assert floor_work(layer("slay"), SHAPE, "forward")[1] == tokens * width * (4 * 256 + 4 * (16 + 16))


def test_a_row_an_entrant_and_direction() -> None:
    report = measure_operations(TINY)
    names = [(row.mechanism, row.form, row.direction) for row in report.rows]
    expected = [("softmax", "flash"), ("softmax", "math"), ("ela_hadamard", "eager")]
    assert names == [(*name, way) for way in ("forward", "training", "backward") for name in expected]
    for row in report.rows:
        assert (row.tokens, row.batch, row.graph, row.peak_memory) == (16, 2, None, None)
        assert row.error is not None
        assert row.error < 1e-6
        if row.direction != "backward":  # the difference may drown in noise
            assert row.call is not None
            assert row.times_floor == pytest.approx(row.call.median / row.floor, rel=1e-3)
            assert row.speedup is not None
            assert row.reason is None
    fastest = max(row.speedup or 0 for row in report.rows[:2])
    assert fastest == 1


def test_the_truth_is_that_of_the_whole() -> None:
    for name in ("ela_hadamard", "gka", "dark"):
        entrant = next(e for e in entrants(SHAPE, [name], ["eager"], 16) if e.mechanism == name)
        x = torch.randn(2, 10, entrant.layer.streams * 24).bfloat16().requires_grad_()
        g = torch.randn(2, 10, 24).bfloat16()
        truth = entrant.truth("training", x, g)
        found = entrant.run("training", x, g)
        apart = found[0], found[1].reshape(2, 10, entrant.layer.streams, 24)
        for one, two in zip(apart, truth, strict=True):
            part = one[tuple(map(slice, two.shape))].double()
            assert (part - two).norm() < 0.02 * two.norm()


def test_what_is_not_finite_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ElaHadamardAttention, "log_features", lambda self, x: x * torch.nan)
    for row in measure_operations(TINY).rows:
        if row.mechanism == "ela_hadamard":
            assert row.time is None
            assert row.times_floor is None
            assert row.reason == "not finite"


def test_what_raises_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ElaHadamardAttention, *args: object) -> Tensor:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(ElaHadamardAttention, "attend", fail)
    rows = [row for row in measure_operations(TINY).rows if row.mechanism == "ela_hadamard"]
    assert [row.time for row in rows] == [None] * 3
    assert {row.reason for row in rows} == {"RuntimeError: no such kernel"}


class Biased(torch.nn.Module):
    """A module whose output is off, and off by something else at every call."""

    def __init__(self, module: torch.nn.Module, by: float, more: float) -> None:
        super().__init__()
        self.module, self.by, self.more = module, by, more

    def forward(self, x: Tensor) -> Tensor:
        self.by += self.more
        return self.module(x) * (1 + self.by)


@pytest.mark.parametrize("causal", [False, True])
def test_exact_softmax_is_that_of_pytorch_block_by_block(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionattn.profiling.entrants.EXACT_BLOCK", 4)
    x = torch.randn(2, 10, 72, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 10, 24, dtype=torch.float64)
    found, expected = (
        (y, *torch.autograd.grad(y, x, g))
        for y in (
            ExactSoftmax(24, 3, projections=False)(x, is_causal=causal),
            ATTENTION["softmax"](24, 3, projections=False)(x, is_causal=causal),
        )
    )
    torch.testing.assert_close(found, expected)


def test_causal_forms_are_held_against_causal_truth() -> None:
    rows = measure_operations(dataclasses.replace(TINY, causal=True)).rows
    assert all(row.error is not None and row.error < 1e-6 for row in rows)
    shape = dataclasses.replace(SHAPE, causal=True)
    for entrant in entrants(shape, ["ela_hadamard"], ["eager"], 16):
        x = torch.randn(2, 10, 72).bfloat16()
        with entrant.within():
            (whole,) = entrant.run("forward", x, x)
            (part,) = entrant.run("forward", x[:, :5].contiguous(), x)
        torch.testing.assert_close(whole[:, :5], part, rtol=1e-2, atol=1e-2)  # later tokens change nothing


@pytest.mark.parametrize(
    ("by", "more", "reason"),
    [(0.0, 0.0, None), (0.02, 0.0, "times that of the eager"), (0.5, 0.0, "relative error"), (0, 1e-4, "other bits")],
)
def test_what_is_worse_than_eager_or_never_the_same(by: float, more: float, reason: str | None) -> None:
    shape = Shape(2, 10, 3, 8, torch.float32 if more else torch.bfloat16, torch.device("cpu"))
    entrant = list(entrants(shape, ["ela_hadamard"], ["eager"], 16))[-1]
    x, g = torch.randn(2, 10, 72).to(shape.dtype), torch.randn(2, 10, 24).to(shape.dtype)
    judge = Judge("forward", {3: [(x, g)]})
    assert judge(entrant).ratio == 1
    if more:
        judge._eager = [1.0]  # only the bits are to be wrong
    changed = type(entrant)(
        "ela_hadamard", "fused", entrant.layer, entrant.exact, Biased(entrant.layer, by, more), entrant.within
    )
    verdict = judge(changed)
    if reason is None:
        assert verdict.reason is None
    else:
        assert verdict.reason is not None
        assert reason in verdict.reason


def test_backward_is_what_training_adds() -> None:
    whole, part = Milliseconds(median=5, p5=4, p95=7), Milliseconds(median=2, p5=1, p95=3)
    found = difference(Trial(Verdict(0.5), None, whole, whole), Trial(Verdict(0.1), None, part, part))
    assert found.call == found.host == Milliseconds(median=3, p5=1, p95=6)
    assert found.verdict.error == 0.5
    drowned = difference(Trial(Verdict(), None, part), Trial(Verdict(), None, whole))
    assert (drowned.call, drowned.reason) == (None, "training took no longer than forward: noise")


def test_bad_plans() -> None:
    with pytest.raises(UnknownNameError, match="hadamard"):
        measure_operations(Plan(mechanisms=["hadamard"]))
    with pytest.raises(ConfigError, match="tokens=0"):
        measure_operations(Plan(tokens=[0]))
    with pytest.raises(ConfigError, match="batch=-1"):
        measure_operations(Plan(batch=-1))


def test_the_command_writes_report_tables_and_picture(profiler: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "new" / "ops.json"
    small = ["--tokens", "16", "--tokens", "32", "--total", "32", "--heads", "2", "--head-dim", "8", "--rounds", "2"]
    chosen = [
        "--mechanism",
        "relu",
        "--forms",
        "eager",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--direction",
        "forward",
        "--causal",
    ]
    done = CliRunner().invoke(profiler.app, ["ops", *small, *chosen, "--output", str(output)])
    assert done.exit_code == 0, done.output
    content = json.loads(output.read_text())
    environment = content.pop("environment")
    assert {"driver", "cuda", "versions"} <= set(environment)
    report = OperationsReport.model_validate(content)
    assert [(row.tokens, row.batch) for row in report.rows[::3]] == [(16, 2), (32, 1)]
    assert {row.direction for row in report.rows} == {"forward"}
    assert report.causal
    assert "| relu | eager |" in output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in output.parent.iterdir()) == ["ops.json", "ops.md", "ops.png"]


@pytest.mark.parametrize("wrong", [["--forms", "jit"], ["--direction", "sideways"], ["--dtype", "int8"]])
def test_the_command_refuses(profiler: ModuleType, wrong: list[str]) -> None:
    done = CliRunner().invoke(profiler.app, ["ops", *wrong])
    assert isinstance(done.exception, ConfigError)
    assert "accepted" in str(done.exception)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_by_graph_and_by_call() -> None:
    plan = Plan(["ela_hadamard"], [256], ["eager", "compiled"], total=1024, device=torch.device("cuda"), rounds=5)
    rows = [row for row in measure_operations(plan).rows if row.mechanism == "ela_hadamard"]
    assert len(rows) == 6
    for row in rows:
        assert row.reason is None
        assert row.graph is not None
        assert row.call is not None
        assert row.host is not None
        assert row.peak_memory


def test_what_is_cut_short_leaves_its_rows(
    profiler: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "ops.json"
    measured = operations._measure

    def cut(plan: Plan, shape: Shape, floor_of: object) -> object:
        if shape.tokens == 24:
            raise KeyboardInterrupt
        return measured(plan, shape, floor_of)

    monkeypatch.setattr(operations, "_measure", cut)
    small = ["--device", "cpu", "--heads", "2", "--head-dim", "8", "--dtype", "fp32", "--rounds", "2", "--total", "32"]
    chosen = ["--mechanism", "elu", "--forms", "eager", "--tokens", "16", "--tokens", "24", "--direction", "forward"]
    command = ["ops", *small, *chosen, "--output", str(output)]
    assert CliRunner().invoke(profiler.app, command).exit_code != 0
    assert not output.exists()
    kept = json.loads((tmp_path / "ops.partial.json").read_text())
    assert {row["tokens"] for row in kept["rows"]} == {16}
    monkeypatch.setattr(operations, "_measure", measured)
    assert CliRunner().invoke(profiler.app, command).exit_code == 0
    assert not (tmp_path / "ops.partial.json").exists()
