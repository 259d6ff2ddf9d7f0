"""align(): students come nearer to teachers, without labels; a run that was killed goes on to the same weights."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import visionattn
from visionattn.conversion.refit import refit
from visionattn.conversion.units import units_of
from visionattn.errors import ConfigError, WeightsError


@pytest.fixture(scope="module")
def teacher() -> Any:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5, embed_dim=24, depth=3, init_values=1.0
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for block in model.blocks:
        block.attn.qkv.weight.data *= 4  # attention that is far from the mean of all values
    return model.eval()


def loader(count: int = 48) -> Any:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.zeros(count)), batch_size=16, shuffle=True)


def distances(student: Any, teacher: Any) -> tuple[list[float], float]:
    """Relative error of the blocks on the teacher's inputs, and of the final tokens."""
    x = loader().dataset[:16][0]
    with torch.no_grad():
        student(x)
        _, states = teacher.forward_intermediates(x, norm=False, output_fmt="NLC", return_prefix_tokens=True)
        inputs = [torch.cat((prefix, patches), 1) for patches, prefix in states]
        errors = []
        for index in (1, 2):  # the input of block i is the output of block i - 1
            expected, found = (model.blocks[index](inputs[index - 1]) for model in (teacher, student))
            errors.append(((found - expected).norm() / (expected - inputs[index - 1]).norm()).item())
        truth = teacher.forward_features(x)
        return errors, ((student.forward_features(x) - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("stage", ["blocks", "features"])
def test_students_come_nearer(teacher: Any, stage: Any) -> None:
    before = copy.deepcopy(teacher.state_dict())
    student = visionattn.convert(teacher, "ela_hadamard", local=3, keep_softmax=[0])
    first = distances(student, teacher)
    done = visionattn.align(student, teacher, loader(), stage=stage, steps=60, rate=3e-3, progress=False)
    blocks, tokens = distances(student, teacher)
    if stage == "blocks":
        assert all(now < 0.85 * then for now, then in zip(blocks, first[0], strict=True))
    assert tokens < (0.85 if stage == "blocks" else 0.6) * first[1]
    assert done.steps == 60
    assert done.losses[-1] < done.losses[0]
    for key, value in before.items():
        assert torch.equal(teacher.state_dict()[key], value)
    if stage == "blocks":  # blocks that were not converted are left alone
        assert torch.equal(student.blocks[0].mlp.fc1.weight, teacher.blocks[0].mlp.fc1.weight)


class KilledError(Exception):
    pass


class Stopping:
    """A loader whose process is killed after some batches."""

    def __init__(self, after: int) -> None:
        self.inner, self.left = loader(), after

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self.inner:
            if not self.left:
                raise KilledError
            self.left -= 1
            yield images


@pytest.mark.parametrize("stage", ["blocks", "features"])
def test_killed_run_goes_on_to_the_same_weights(teacher: Any, stage: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"stage": stage, "steps": 8, "progress": False, "save_every": 0.0}
    whole = visionattn.convert(teacher, "relu")
    expected = visionattn.align(whole, teacher, loader(), **options)
    killed = visionattn.convert(teacher, "relu")
    with pytest.raises(KilledError):
        visionattn.align(killed, teacher, Stopping(5), folder=tmp_path, **options)
    student = visionattn.convert(teacher, "relu")
    found = visionattn.align(student, teacher, loader(), folder=tmp_path, **options)
    for key, value in whole.state_dict().items():
        assert torch.equal(student.state_dict()[key], value), key
    assert found.losses == expected.losses
    assert found.steps == 8
    again = visionattn.convert(teacher, "relu")  # a run that is finished is read, not done again
    visionattn.align(again, teacher, loader(), folder=tmp_path, **options)
    assert torch.equal(again.blocks[1].attn.qkv.weight, student.blocks[1].attn.qkv.weight)


def test_head_is_matched(teacher: Any) -> None:
    found = {}
    for head in (None, lambda tokens: teacher.head(tokens[:, 0])):
        student = visionattn.convert(teacher, "relu")
        visionattn.align(student, teacher, loader(), stage="features", steps=60, head=head, progress=False, rate=1e-3)
        x = loader().dataset[:][0]
        with torch.no_grad():
            outputs = [teacher.head(m.forward_features(x)[:, 0]) for m in (student, teacher)]
        found[head is None] = (outputs[0] - outputs[1]).norm().item()
    assert found[False] < found[True]


def test_wrong_arguments_are_named(teacher: Any, tmp_path: Path) -> None:
    student = visionattn.convert(teacher, "relu")
    for options, message in (
        ({"stage": "block"}, "nearest: blocks"),
        ({"precision": "fp8"}, "bf16, fp32"),
        ({"loader": []}, "empty"),
        ({"loader": iter([])}, "give steps"),
        ({"student": teacher}, "was not converted"),
        ({"teacher": torch.nn.Linear(2, 2)}, "other blocks"),
    ):
        arguments = {
            "student": student,
            "teacher": teacher,
            "loader": loader(),
            "steps": 0 if "loader" in options else 2,
        }
        if options.get("loader") == []:
            arguments["steps"] = 2
        with pytest.raises(ConfigError, match=message):
            visionattn.align(**(arguments | {"progress": False} | options))
    visionattn.align(student, teacher, loader(), steps=2, folder=tmp_path, progress=False)
    with pytest.raises(WeightsError, match="steps was 2"):
        visionattn.align(student, teacher, loader(), steps=3, folder=tmp_path, progress=False)
    (tmp_path / "align-blocks.pt").write_bytes(b"no file of ours")
    with pytest.raises(WeightsError, match="cannot be gone on from"):
        visionattn.align(student, teacher, loader(), steps=2, folder=tmp_path, progress=False)


def test_loss_that_is_no_number_is_an_error(teacher: Any) -> None:
    student = visionattn.convert(teacher, "relu")
    student.blocks[0].attn.proj.bias.data.fill_(torch.nan)
    with pytest.raises(ConfigError, match="lower rate"):
        visionattn.align(student, teacher, loader(), steps=2, progress=False)


@pytest.mark.parametrize("local", [0, 3])
def test_refit_makes_good_what_linear_attention_misses(teacher: Any, local: int) -> None:
    images = loader().dataset[:][0]
    plain = visionattn.convert(teacher, "ela_hadamard", keep_softmax=[0])
    student = visionattn.convert(teacher, "ela_hadamard", keep_softmax=[0], local=local, calibrate=images, refit=True)
    assert distances(student, teacher)[1] < 0.95 * distances(plain, teacher)[1]
    assert torch.equal(student.blocks[0].attn.proj.weight, teacher.blocks[0].attn.proj.weight)
    assert torch.equal(student.blocks[1].attn.qkv.weight, teacher.blocks[1].attn.qkv.weight)


def test_refit_finds_weights_that_were_changed(teacher: Any) -> None:
    """A student whose attention is exact, and whose projection alone was spoilt, gets it back."""
    images = torch.randn(400, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    student = visionattn.convert(teacher, "softmax", center_keys=False)
    student.blocks[1].attn.proj.weight.data += 0.02 * torch.randn(24, 24)
    before = distances(student, teacher)[1]
    refit(student, teacher, images)
    assert distances(student, teacher)[1] < 0.1 * before


def test_refit_says_what_it_needs(teacher: Any) -> None:
    student = visionattn.convert(teacher, "relu")
    with pytest.raises(ConfigError, match="two and more"):
        refit(student, teacher, loader().dataset[:4][0])
    with pytest.raises(ConfigError, match="give a hundred"):
        visionattn.convert(teacher, "relu", refit=True)


class Pair(torch.nn.Module):
    """A block of two attentions, in a model whose attentions also stand in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.ModuleDict({"one": timm.layers.Attention(24, 3)})
        self.shared = Shared()

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x + self.block["one"](x))


class Shared(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = timm.layers.Attention(24, 3), timm.layers.Attention(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.first(x) + self.second(x)


def test_blocks_of_own_models() -> None:
    torch.manual_seed(0)
    model, tokens = Pair(), [torch.randn(4, 9, 24)] * 3
    student = visionattn.convert(model, "relu")
    assert [unit.path for unit in units_of(student, model)] == ["block.one", "shared"]
    done = visionattn.align(student, model, tokens, steps=30, progress=False)
    assert done.losses[-1] < done.losses[0]
