"""A benchmark's plan, and the report that it goes on with."""

import json

import pytest
import torch
import yaml

from tests.detection.test_head import tiny
from visionattn.config import DetectConfig, parse_config
from visionattn.engine.benchmark import Benchmark, Run, plan_runs, read_benchmark, recipe_of, run_all, write_models
from visionattn.errors import ConfigError


@pytest.fixture
def config(tmp_path):
    raw = {"task": "detect", "model": "yolo-lat-n", "data": "/sets/fish/data.yaml", "name": "fish", "epochs": 7}
    made = parse_config(raw | {"output": str(tmp_path / "runs")})
    assert isinstance(made, DetectConfig)
    return made


def test_a_training_for_each_model_and_seed_in_a_folder_of_its_own(config, tmp_path):
    entries = plan_runs(config, ["yolo-lat-p", "some/where/wide.yaml"], [3, 5])
    names = ["fish-yolo-lat-p-seed3", "fish-wide-seed3", "fish-yolo-lat-p-seed5", "fish-wide-seed5"]
    assert [entry.config.name for entry in entries] == names
    assert [entry.config.model for entry in entries] == ["yolo-lat-p", "some/where/wide.yaml"] * 2
    assert [entry.config.seed for entry in entries] == [3, 3, 5, 5]
    assert {entry.config.epochs for entry in entries} == {7}
    assert len({entry.log for entry in entries}) == 4
    assert not (tmp_path / "runs").exists()


def test_trainings_that_would_share_a_folder(config):
    with pytest.raises(ConfigError, match=r"models share the names a, b; give each yaml a name of its own"):
        plan_runs(config, ["x/a.yaml", "b", "c.yaml", "y/a.yaml", "b.yaml"], [0])
    with pytest.raises(ConfigError, match="got the seeds 0, 1, 0; give each once"):
        plan_runs(config, ["a.yaml"], [0, 1, 0])


def test_written_models_keep_names_and_the_order_of_keys(tmp_path):
    content = {"nc": 2, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": []}
    (path,) = write_models([("narrow", content)], tmp_path / "models")
    assert path == str(tmp_path / "models" / "narrow.yaml")
    assert list(yaml.safe_load((tmp_path / "models" / "narrow.yaml").read_text()).items()) == list(content.items())


def report(config, path, runs):
    written = Benchmark(recipe=recipe_of(config), runs=runs).model_dump(mode="json")
    path.write_text(json.dumps(written | {"environment": {"commit": None}}))
    return path


def test_a_report_is_gone_on_with_wherever_data_and_runs_lie(config, tmp_path):
    path = report(config, tmp_path / "r.json", [Run(model="a", seed=0, reason="no")])
    moved = config.model_copy(update={"data": "/other/fish/data.yaml", "device": "0", "output": tmp_path, "seed": 4})
    assert read_benchmark(path, moved).runs == [Run(model="a", seed=0, reason="no")]
    assert read_benchmark(tmp_path / "none.json", config).runs == []


@pytest.mark.parametrize("changed", [{"epochs": 8}, {"data": "/sets/birds/data.yaml"}, {"ultralytics": {"lr0": 0.1}}])
def test_a_report_of_another_recipe(config, tmp_path, changed):
    path = report(config, tmp_path / "r.json", [])
    with pytest.raises(ConfigError, match=rf"another recipe \({next(iter(changed))} differ\)"):
        read_benchmark(path, config.model_copy(update=changed))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"recipe": {}, "runs": [{"model": 1}]}'])
def test_a_file_that_is_no_report(config, tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is no report of a benchmark; choose another --output"):
        read_benchmark(path, config)


def test_what_counts_as_trained(config, tmp_path):
    model = str(tiny(tmp_path))
    (entry,) = plan_runs(config, [model], [0])
    digest = fingerprint_of(entry)
    good = {"model": model, "seed": 0, "fingerprint": digest, "scores": {"ap": 0.5}}
    for changed, known in (
        ({}, True),
        ({"model": "elsewhere/tiny.yaml"}, True),
        ({"seed": 1}, False),
        ({"model": "other.yaml"}, False),
        ({"scores": {}, "reason": "it failed"}, False),
        ({"fingerprint": "of another"}, False),
    ):
        found = Benchmark(recipe={}, runs=[Run(**(good | changed))]).trained(entry)
        assert (found is not None) == known, changed
    text = (tmp_path / "tiny.yaml").read_text()
    (tmp_path / "tiny.yaml").write_text(text + "# a remark\n")
    assert fingerprint_of(entry) == digest
    (tmp_path / "tiny.yaml").write_text(text.replace("[16, 3, 2]", "[24, 3, 2]"))
    assert fingerprint_of(entry) != digest


def fingerprint_of(entry):
    from visionattn.detection import fingerprint

    return fingerprint(entry.config.model)


def test_nothing_to_train(config):
    assert run_all([], 2, lambda _: pytest.fail("nothing was trained")) == []
    assert torch.get_num_threads() > 0
