"""What a model's layers are told to do, and why."""

import pytest
import timm
import torch

import visionattn
from visionattn.errors import ConfigError
from visionattn.ops import switch


def model_of(name: str, **options: object) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", attn_layer=name, depth=2, img_size=32, **options)


def test_every_layer_and_its_reason() -> None:
    rows = visionattn.explain(model_of("ela_hadamard"), torch.randn(1, 3, 32, 32))
    assert [row.name for row in rows] == ["blocks.0.attn", "blocks.1.attn"]
    assert {row[1:] for row in rows} == {("ela_hadamard", "eager", "the inputs are on cpu, and kernels run on cuda")}
    assert str(rows).splitlines()[1].startswith("blocks.0.attn  ela_hadamard  eager  the inputs are on cpu")


def test_the_path_that_the_interpreter_takes() -> None:
    pytest.importorskip("triton", reason="kernels need Triton")
    with switch.kernels("fused"):
        (first, _) = visionattn.explain(model_of("elu"), torch.randn(1, 3, 32, 32))
    assert first == ("blocks.0.attn", "elu", "fused", "")


def test_the_switch_is_a_reason() -> None:
    with switch.kernels("eager"):
        (first, _) = visionattn.explain(model_of("relu"), torch.randn(1, 3, 32, 32))
    assert first.reason == "kernels('eager') is chosen"


def test_mechanisms_without_kernels_of_ours() -> None:
    x = torch.randn(1, 3, 32, 32)
    assert visionattn.explain(model_of("softmax"), x)[0].path == "pytorch"
    assert visionattn.explain(model_of("uniform"), x)[0].reason == "there is none for this mechanism and its options"
    assert visionattn.explain(model_of("gka"), x)[0].reason == "it has no kernel"


def test_layers_that_are_not_called_and_errors_leave_no_listener() -> None:
    model = model_of("ela_hadamard")
    model.blocks = model.blocks[:1]  # type: ignore[index]
    model.spare = torch.nn.ModuleList([visionattn.ATTENTION["elu"](32, 2)])
    assert visionattn.explain(model, torch.randn(1, 3, 32, 32))[1] == ("spare.0", "elu", "not called", "")
    with pytest.raises(AssertionError):
        visionattn.explain(model, torch.randn(1, 3, 31, 31))
    assert not switch.listeners


def test_a_model_without_attention_is_named() -> None:
    with pytest.raises(ConfigError, match="Linear without attention"):
        visionattn.explain(torch.nn.Linear(2, 2), torch.randn(1, 2))
