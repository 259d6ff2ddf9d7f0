"""A classifier survives its file, and a file that is none of ours is refused without running anything from it."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from visionattn.backbones import classifier as module
from visionattn.backbones.classifier import build_classifier, load_classifier, save_classifier
from visionattn.errors import ConfigError, VisionAttnError, WeightsError

CLASSES = ["cat", "dog", 'ünïcode "quoted"']
SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}


def save(built, path):
    save_classifier(
        built.model,
        path,
        name=built.name,
        kwargs=built.kwargs,
        classes=built.classes,
        data_config=built.data_config,
    )


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "best.safetensors"
    save(build_classifier("test_vit", CLASSES, 32, {}), path)
    return path


def rewrite(path, **changes):
    """Change the description in a file, keeping its tensors."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    description = json.loads(metadata["classifier"]) | changes
    save_file(load_file(path), path, {**metadata, "classifier": json.dumps(description)})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {"drop_path_rate": 0.1}),
        ("test_convnext", {}),  # takes no img_size
        ("vit_tiny_patch16_224", SMALL | {"attn_layer": "ela_hadamard"}),
        (
            "vit_tiny_patch16_224",
            SMALL
            | {
                "attn_layer": {"name": "slay", "poly": "exact", "features": 2},
                "block_fn": {"name": "HyperLinkBlock", "memory": True},
                "mlp_layer": {"name": "MoEMlp", "experts": 3},
            },
        ),
        ("vit_tiny_patch16_224", SMALL | {"block_fn": "PreNormBlock", "mlp_layer": "MoEMlp"}),
        ("vit_tiny_patch16_224.augreg_in21k", SMALL | {"class_token": False, "global_pool": "avg"}),
    ],
)
def test_the_loaded_model_computes_the_same(tmp_path, name, options):
    torch.manual_seed(0)
    built = build_classifier(name, CLASSES, 64, options)
    save(built, tmp_path / "a.safetensors")
    loaded = load_classifier(tmp_path / "a.safetensors")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), built.model.eval()(images))
    assert (loaded.name, loaded.kwargs, loaded.classes) == (name, built.kwargs, CLASSES)
    assert tuple(loaded.data_config["input_size"]) == (3, 64, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("attention", ["ela_hadamard", "softmax", "dark", {"name": "slay", "features": 4}])
def test_training_goes_on_from_softmax_weights_with_another_attention(weights, tmp_path, attention, caplog):
    softmax = load_classifier(weights)
    built = build_classifier(str(weights), CLASSES, 32, {"attn_layer": attention})
    before, after = softmax.model.state_dict(), built.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    lacking = sorted(key for key in after.keys() - before.keys() if key.endswith(".shift"))
    assert bool(lacking) == (attention == "dark")
    assert (f"lacks {len(lacking)} weights, which begin as they are made: {', '.join(lacking)}" in caplog.text) == bool(
        lacking
    )
    save(built, tmp_path / "linear.safetensors")
    again = load_classifier(tmp_path / "linear.safetensors")
    assert again.kwargs["attn_layer"] == attention
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.model(images), built.model.eval()(images))
        assert torch.allclose(again.model(images), softmax.model(images), atol=1e-5) == (attention == "softmax")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attn_layer": "sofmax"}, WeightsError, "nearest: softmax"),
        ({"attn_layer": "gka"}, WeightsError, "there is no place for .*qkv"),
        ({"depth": 3}, WeightsError, r"there is no place for blocks\.3"),
        ({"embed_dim": 32}, WeightsError, "size mismatch"),
        ({"embed_dimm": 32}, WeightsError, "embed_dimm"),
        ({"num_classes": 3}, ConfigError, "the classes are those of the data"),
        ({"pretrained": True}, ConfigError, "the weights to start from are those of the model"),
    ],
)
def test_options_that_the_weights_do_not_fit(weights, options, error, message):
    with pytest.raises(error, match=message):
        build_classifier(str(weights), CLASSES, 32, options)


def test_a_full_disk(weights, full_disk):
    before, built = weights.read_bytes(), build_classifier("test_vit", CLASSES, 32, {})
    with full_disk(10_000), pytest.raises(OSError, match=r"best\.safetensors"):
        save(built, weights)
    assert {path.name: path.read_bytes() for path in weights.parent.iterdir()} == {weights.name: before}


def test_any_reader_of_safetensors_reads_it(weights):
    with safe_open(str(weights), framework="np") as file:
        assert file.metadata()["format"] == "visionattn-classifier"
        assert file.get_tensor("head.weight").shape[0] == len(CLASSES)


def test_sources_of_weights_are_not_kept(tmp_path):
    start = tmp_path / "start.pth"
    torch.save(build_classifier("test_vit", CLASSES, 32, {}).model.state_dict(), start)
    built = build_classifier("test_vit", CLASSES, 32, {"checkpoint_path": str(start)})
    assert torch.equal(built.model.state_dict()["head.weight"], torch.load(start)["head.weight"])
    assert "checkpoint_path" not in built.kwargs


def test_a_failed_write_leaves_the_old_file(weights, monkeypatch):
    before = weights.read_bytes()

    def fail(model, path, metadata):
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_model", fail)
    with pytest.raises(KeyboardInterrupt):
        save(build_classifier("test_vit", CLASSES, 32, {}), weights)
    assert weights.read_bytes() == before


def test_parts_that_do_not_exist_are_named():
    for options, message in (
        ({"attn_layer": {"name": "slay", "polly": "exact"}}, "polly"),
        ({"attn_layer": {"name": "slai"}}, "nearest: slay"),
        ({"block_fn": "HyperLinkBlok"}, "nearest: HyperLinkBlock"),
        ({"mlp_layer": {"name": "MoEMlp", "expert": 3}}, "nearest: experts"),
    ):
        with pytest.raises(VisionAttnError, match=message):
            build_classifier("vit_tiny_patch16_224", CLASSES, 32, SMALL | options)


class TestRefusedFiles:
    def refused(self, path, message):
        with pytest.raises(WeightsError, match=message):
            load_classifier(path)

    def test_missing(self, tmp_path):
        self.refused(tmp_path / "none.safetensors", "not found: .*none.safetensors; give")

    def test_a_pickle_is_never_opened(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (pytest.fail, ("the pickle ran",))

        for name, message in (("a.pt", "suffix '.pt'"), ("a.safetensors", "damaged or no safetensors")):
            (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
            self.refused(tmp_path / name, message)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1000])
    def test_truncated(self, weights, keep):
        weights.write_bytes(weights.read_bytes()[:keep])
        self.refused(weights, "damaged or no safetensors")

    def test_of_others(self, weights):
        save_file(load_file(weights), weights, {"format": "pt"})
        self.refused(weights, "not describe a classifier of ours")

    def test_no_metadata(self, weights):
        save_file(load_file(weights), weights)
        self.refused(weights, "not describe a classifier of ours")

    def test_damaged_description(self, weights):
        rewrite(weights, classes=3)
        self.refused(weights, "description of the model is damaged")

    @pytest.mark.parametrize("classes", [["cat"], [*CLASSES, "fish"]])
    def test_other_number_of_classes(self, weights, classes):
        rewrite(weights, classes=classes)
        self.refused(weights, f"do not fit the model they describe, test_vit with {len(classes)} classes")

    def test_other_model(self, weights):
        rewrite(weights, name="test_convnext", kwargs={})
        self.refused(weights, "do not fit")

    @pytest.mark.parametrize(
        "changes",
        [
            {"name": "hf-hub:someone/model"},
            {"name": "local-dir:/tmp"},
            {"name": "no_such_model"},
            {"kwargs": {"checkpoint_path": "/tmp/other.pth"}},
            {"kwargs": {"pretrained": True}},
        ],
    )
    def test_reaching_for_other_files(self, weights, changes):
        rewrite(weights, **changes)
        self.refused(weights, "asks for a model that this timm does not have or for other files")


@pytest.mark.parametrize(
    ("name", "imgsz", "options", "message"),
    [
        ("vit_tiny_patch16_225", 32, {}, "unknown name 'vit_tiny_patch16_225'; nearest: vit_tiny_patch16_224"),
        ("test_vit.none", 32, {}, "none"),
        ("test_vit", 32, {"embed_dimm": 3}, "embed_dimm"),
        ("test_vit", 32, {"attn_layer": "elu_"}, "attn_layer: got 'elu_'; accepted: .*nearest: elu"),
        ("test_vit", 32, {"num_classes": 3}, "num_classes is not to be set"),
        ("test_vit", 32, {"global_pool": ""}, r"returns \(1, 5, 3\) for an image"),
        ("test_vit", 32, {"in_chans": 1}, "does not take images of 32 x 32"),
        ("test_vit", 32, {"patch_size": 64}, "does not take images of 32 x 32"),
    ],
)
def test_refused_models(name, imgsz, options, message):
    with pytest.raises(ConfigError, match=message):
        build_classifier(name, CLASSES, imgsz, options)


class TestStartingFromWeights:
    def test_the_same_classes_keep_the_head(self, weights):
        started = build_classifier(str(weights), CLASSES, 32, {})
        assert torch.equal(started.model.state_dict()["head.weight"], load_file(weights)["head.weight"])

    def test_other_classes_get_a_new_head_on_the_same_body(self, weights, tmp_path):
        started = build_classifier(str(weights), ["a", "b"], 32, {})
        state, before = started.model.state_dict(), load_file(weights)
        assert state.pop("head.weight").shape[0] == state.pop("head.bias").shape[0] == 2
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
        save(started, tmp_path / "two.safetensors")
        assert load_classifier(tmp_path / "two.safetensors").classes == ["a", "b"]


def test_loading_needs_no_ultralytics(weights):
    code = f"import sys; from visionattn.backbones.classifier import load_classifier; load_classifier({str(weights)!r})"
    check = "; assert 'ultralytics' not in sys.modules"
    subprocess.run([sys.executable, "-c", code + check], check=True)
