"""What is said about a conversion is true: sensitivities, figures of blocks, speeds."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import visionattn
from tests.conversion.test_convert import build, images
from visionattn.conversion import ConversionReport, Speed, report, sensitivity
from visionattn.errors import ConfigError
from visionattn.profiling.crossover import blocks_within, measure_crossover


@pytest.fixture(scope="module")
def model() -> Any:
    model = build("registers")
    model.blocks[1].attn.qkv.weight.data *= 6  # attention that is far from uniform: the block to keep
    return model


@torch.no_grad()
def test_sensitivity_is_that_of_one_block_swapped(model: Any) -> None:
    x = images(model, 20)
    before = model.forward_features(x)
    student = visionattn.convert(model, "uniform", local=3)
    losses = sensitivity(student, model, x)
    assert list(losses) == [f"blocks.{index}.attn" for index in range(3)]
    middle = before[:16].flatten(0, 1).mean(0)
    for index, loss in enumerate(losses.values()):
        swapped = visionattn.convert(model, "uniform", keep_softmax=[i for i in range(3) if i != index])
        cosine = F.cosine_similarity(swapped.forward_features(x) - middle, before - middle, dim=-1).mean()
        assert loss == pytest.approx(1 - cosine.item(), abs=1e-5)
    assert max(losses, key=losses.__getitem__) == "blocks.1.attn"
    assert torch.equal(model.forward_features(x), before)  # the teacher is as it was


def test_auto_keeps_the_most_sensitive_blocks(model: Any) -> None:
    x = images(model, 8)
    student = visionattn.convert(model, "uniform", calibrate=x, keep_softmax="auto", budget=1)
    assert list(student.attention_layers) == ["blocks.0.attn", "blocks.2.attn"]
    with pytest.raises(ConfigError, match="measured on images"):
        visionattn.convert(model, "uniform", keep_softmax="auto")
    with pytest.raises(ConfigError, match="keeps all 3"):
        visionattn.convert(model, "uniform", keep_softmax="auto", budget=3, calibrate=x)


@pytest.mark.parametrize("kind", ["registers", "rope"])
@torch.no_grad()
def test_figures_of_the_report(kind: str) -> None:
    model = build(kind)
    x = images(model, 3)
    student = visionattn.convert(model, "relu", keep_softmax=[0])
    found = report(student, model, x)
    assert [block.attention for block in found.blocks] == ["softmax", "relu", "relu"]
    assert found.blocks[0].error == 0
    seen: list[Any] = []
    handle = model.blocks[1].attn.register_forward_hook(lambda m, a, o, k=None: seen.append((a[0], o)))
    truth = model.forward_features(x)
    handle.remove()
    inputs, output = seen[0]
    if kind == "registers":
        attention = model.blocks[1].attn
        q, k, _ = attention.qkv(inputs).reshape(3, -1, 3, 3, 32).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(32)).softmax(-1)
        entropy = -(weights * weights.log()).sum(-1).mean() / math.log(weights.shape[-1])
        assert found.blocks[1].entropy == pytest.approx(entropy.item(), rel=1e-4)
        assert found.blocks[1].largest_weight == pytest.approx(weights.amax(-1).mean().item(), rel=1e-4)
        shift = (k.mean(-2).norm(dim=-1) / k.norm(dim=-1).mean(-1)).mean()
        assert found.blocks[1].key_shift == pytest.approx(shift.item(), rel=1e-4)
        error = (student.blocks[1].attn(inputs) - output).norm() / output.norm()
        assert found.blocks[1].error == pytest.approx(error.item(), rel=1e-4)
    tokens = student.forward_features(x)
    assert found.cosine == pytest.approx(F.cosine_similarity(tokens, truth, dim=-1).mean().item(), abs=1e-5)
    assert found.error == pytest.approx(((tokens - truth).norm() / truth.norm()).item(), rel=1e-4)
    assert found.images == 3


def test_report_is_saved_and_shown(model: Any, tmp_path: Path) -> None:
    found = report(visionattn.convert(model, "elu", local=3), model, images(model))
    found.metrics["top1"] = 0.5
    found.speeds = [Speed((56, 56), 21, 1.0, 2.0), Speed((112, 112), 69, 4.0, 3.0), Speed((224, 224), 261, 9.0, 5.0)]
    assert found.crossover == 69
    found.save(tmp_path / "new" / "report.json")
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["crossover"] == 69
    assert {"device", "versions", "commit", "command"} <= set(content["environment"])
    assert len(content["blocks"]) == 3
    stream = io.StringIO()
    Console(file=stream, width=120).print(found)
    for text in ("blocks.1.attn", "elu", "faster from 69 tokens on", "top1: 0.5", "1.80"):
        assert text in stream.getvalue()


def test_crossover_counts_from_the_largest_size_down() -> None:
    slow = ConversionReport(1, 1, 0, 1, [], [Speed((1, 1), 10, 2.0, 1.0), Speed((2, 2), 40, 2.0, 3.0)])
    assert slow.crossover is None


def test_speeds_are_measured_and_budgets_kept(model: Any) -> None:
    student = visionattn.convert(model, "ela_hadamard")
    (speed,) = measure_crossover(student, model, [(56, 56)], rounds=3)
    assert (speed.tokens, speed.form, speed.softmax_memory) == (21, "eager", None)
    assert speed.softmax > 0
    assert speed.converted > 0
    with pytest.raises(ConfigError, match="size 50x50"):
        measure_crossover(student, model, [(50, 50)])
    known = Speed((1, 1), 1, softmax=22.0, converted=10.0)
    assert [blocks_within(budget, known, 12) for budget in (10.0, 13.5, 1000.0)] == [0, 3, 11]
    with pytest.raises(ConfigError, match="no softmax block it takes 10"):
        blocks_within(9.0, known, 12)
