"""Numbers in the README are those of the result files, and its commands name files that exist."""

import csv
import hashlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from visionattn.detection import WEIGHTS, load_detector
from visionattn.packaged import find_packaged

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = README.split("## Results")[1].split("\n### ")[0]


def scores(file: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((ROOT / "results" / file).read_text())["scores"]
    return found


def means(file: str, *keys: str) -> dict[str, tuple[list[dict[str, Any]], list[float]]]:
    """Runs with scores and their mean scores, by the name of the model."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in json.loads((ROOT / "results" / file).read_text())["runs"]:
        if run["scores"]:
            runs.setdefault(Path(run["model"]).stem, []).append(run)
    return {
        name: (own, [statistics.fmean(run["scores"][key] for run in own) for key in keys]) for name, own in runs.items()
    }


def test_detector_table() -> None:
    shown = re.findall(r"^\| ([\w: -]+) \| (\d\.\d\d) \| (\d\.\d{3} \| .+) \|$", RESULTS, re.MULTILINE)
    found = set()
    for name, (own, (ap, ap50)) in means("aquarium_416/league.json", "ap", "ap50").items():
        label = f"control: {name.split('n-width')[0]}" if "-width" in name else name
        found.add((label, f"{own[0]['parameters'] / 1e6:.2f}", f"{ap:.3f} | {ap50:.3f} | {len(own)}"))
    assert len(shown) >= 11
    assert set(shown) <= found


def test_latencies_of_detectors() -> None:
    times: dict[str, dict[int, float]] = {}
    for row in json.loads((ROOT / "results" / "aquarium_416" / "latency-h200.json").read_text())["rows"]:
        if row["runtime"] == "torch-compiled-graph":
            times.setdefault(Path(row["model"]).stem, {})[row["batch"]] = row["forward"]["median"]
    assert len(times) == 7
    for model, own in times.items():
        assert f"| {model} | {own[1]:.2f} | {own[32]:.2f} |" in RESULTS


def test_blood_cells() -> None:
    league, fresh = means("bccd/league.json", "ap", "ap50"), means("bccd/fresh-seeds.json", "ap")
    assert set(fresh) < set(league)
    for model, (own, (ap, ap50)) in league.items():
        cells = ["-", "-"]
        if model in fresh:
            others, (later,) = fresh[model]
            assert sorted(run["seed"] for run in own + others) == list(range(6))
            whole = statistics.fmean(run["scores"]["ap"] for run in own + others)
            cells = [f"{later:.3f}", f"{whole:.3f}"]
        assert f"| {model} | {ap:.3f} | {' | '.join(cells)} | {ap50:.3f} |" in RESULTS


ABLATED = {
    "`ela_hadamard`, as packaged": "",
    "softmax attention": "-softmax",
    "the plain mean of all values": "-uniform",
    "no attention, the block's 5x5 convolution alone": "-local",
    "a convolution of as many weights": "-conv",
    "nothing, with fewer parameters": "-none",
}


@pytest.mark.parametrize("label", ABLATED)
def test_ablation(label: str) -> None:
    cells = []
    for table in ("p", "n", "p-640", "n-640"):
        found = means(f"aquarium_416/ablation-{table}.json", "ap").get(f"yolo-lat-{table[0]}{ABLATED[label]}")
        assert found is None or len(found[0]) == 3
        cells.append("-" if found is None else f"{found[1][0]:.3f}")
    assert f"| {label} | {' | '.join(cells)} |" in RESULTS


def test_longer_training() -> None:
    (_, (peer,)) = means("aquarium_416/league.json", "ap")["yolo26n"]
    assert f"`-p` has {scores('aquarium_416/yolo-lat-p-seed0.json')['ap']:.3f}" in RESULTS
    assert f"YOLO26n's after 300 is {peer:.3f}" in RESULTS
    runs, (longer,) = means("yolo_lat_search/long-p-2400.json", "ap")["yolo-lat-p"]
    assert len(runs) == 3
    assert f"for 2,400 epochs {longer:.3f} over three seeds" in RESULTS


def test_boxes_without_suppression() -> None:
    def mean(weights: str, nms: str, split: str = "val") -> str:
        files = (ROOT / "results" / "yolo_lat_search" / "peaks").glob(f"{weights}-{nms}-{split}.json")
        return f"{statistics.fmean(json.loads(file.read_text())['scores']['ap'] for file in files):.3f}"

    free, peaks, none = (mean("together-seed?", nms) for nms in ("free", "peaks", "none"))
    assert f"has {free} AP by that branch and {peaks} by both branches together" in README
    assert f"with NMS these weights have {none} " in README
    peaks, none = (mean("second-stage-long", nms) for nms in ("peaks", "none"))
    assert f"has {peaks} by both branches and {none} with NMS" in README
    peaks, none = (mean("second-stage-long", nms, "test") for nms in ("peaks", "none"))
    assert f"on the test split {peaks} and {none}" in README
    peaks, none = (mean("second-stage-seed?", nms) for nms in ("peaks", "none"))
    on_test = " and ".join(mean("second-stage-seed?", nms, "test") for nms in ("peaks", "none"))
    assert f"{peaks} and {none} over three seeds ({on_test})" in README


def test_two_gpus() -> None:
    two = [json.loads((ROOT / f"results/two_gpus/yolo-lat-n-today-seed{s}.json").read_text())["ap"] for s in range(3)]
    (_, (one,)) = means("aquarium_416/league.json", "ap")["yolo-lat-n"]
    assert f"`-n` has {statistics.fmean(two):.3f} AP for {one:.3f} on one" in README


def test_longer_training_at_640_px() -> None:
    found = means("aquarium_416/ablation-n-640-long.json", "ap")
    (ela,), (mean,) = found["yolo-lat-n"][1], found["yolo-lat-n-uniform"][1]
    assert f"`-n` has {ela:.3f} with `ela_hadamard` and {mean:.3f} with the mean" in RESULTS


def test_quickstart_output() -> None:
    assert f"│ {scores('digits/classify.json')['top1']:.4f} │" in README
    found = scores("digits/detect.json")
    cells = " │ ".join(f"{found[key]:.4f}" for key in ("ap", "ap50", "ap75", "ap_small", "ap_medium"))
    assert f"│ {cells} │ -    │" in README


def test_kills() -> None:
    report = json.loads((ROOT / "results" / "kill_and_resume.json").read_text())
    assert f"Killed at {report['kills']} random moments for each task" in README
    for task in report["tasks"].values():
        assert len(task["kills"]) == report["kills"]
        assert task["faults"] == []


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:configs|tools|docs|datasets|results)/[\w./-]+\.\w+", README)))
)
def test_files_named_exist(path: str) -> None:
    assert (find_packaged("configs", path) or ROOT / path).is_file()


SETS = {"aquarium": "aquarium_416", "bccd": "bccd"}


@pytest.mark.parametrize("name", WEIGHTS)
def test_shipped_weights_are_those_that_were_scored(name: str) -> None:
    content = WEIGHTS[name].read_bytes()
    model, _, data = name.rpartition("-")
    report = json.loads((ROOT / "results" / SETS[data] / f"{model}-seed0.json").read_text())
    assert hashlib.sha256(content).hexdigest() == report["sha256"]
    assert len(content) < 5e6
    assert set(load_detector(WEIGHTS[name]).names.values()) == set(report["scores"]["per_class"])
    card = (ROOT / "weights" / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith(f"| `{name}.pt` |"))
    assert f"AP {report['scores']['ap']:.3f}, AP50 {report['scores']['ap50']:.3f} |" in row
    assert not [mark for mark in (b"/tmp", b"/root", b"/home", b"/work") if mark in content], "where it was trained"


def test_figures_of_the_stages_are_those_of_the_file() -> None:
    text = (ROOT / "results" / "README.md").read_text()
    section = text.split("## Attention in the stages")[1].split("\n## ")[0]
    shown = [float(number) for number in re.findall(r"\| (0\.\d{4}) \|", section)]
    for name, top1 in zip(["uniform", "linear", "softmax1", "softmax", "softmax2"], shown, strict=True):
        with (ROOT / "results" / "lat_stages" / f"{name}-seed0.csv").open() as file:
            rows = {int(row["epoch"]): float(row["top1"]) for row in csv.DictReader(file)}
        assert round(rows[11], 4) == top1, name


EXPORTED = {
    "weights, torch": "torch",
    "ONNX fp32": "onnx-fp32",
    "ONNX fp32, suppression in the graph": "onnx-fp32-nms",
    "ONNX fp16": "onnx-fp16",
    "ONNX int8": "onnx-int8",
    "OpenVINO fp32": "openvino-fp32",
    "OpenVINO int8": "openvino-int8",
    "TorchScript fp32": "torchscript-fp32",
    "`.pt2` fp32": "pt2-fp32",
}


OF_S = {"torch", "onnx-fp32", "onnx-fp16", "openvino-fp32"}


@pytest.mark.parametrize("label", EXPORTED)
def test_scores_of_exports(label: str) -> None:
    cells = []
    for model in "pns":
        path = ROOT / "results" / "export" / "aquarium_416" / f"yolo-lat-{model}-{EXPORTED[label]}.json"
        measured = model != "s" or EXPORTED[label] in OF_S
        cells.append(f"{json.loads(path.read_text())['scores']['ap']:.4f}" if measured else "-")
    assert f"| {label} | {' | '.join(cells)} |" in README


def test_errors_of_exports() -> None:
    graphs = json.loads((ROOT / "results" / "export" / "parity.json").read_text())["graphs"]
    exact = [row["error"] for row in graphs if row["precision"] == "fp32"]
    assert f"at most {max(exact):.1e} in fp32" in README
    apart = {row["mechanism"] for row in graphs if row["precision"] == "fp16" and not row["error"] <= 1e-2}
    assert apart == {"softmax", "performer", "dark"}
    assert all(row["peak"] < 65504 for row in graphs if row["precision"] == "fp16")


@pytest.mark.parametrize("size", [320, 640])
def test_latencies(size: int) -> None:
    rows = json.loads((ROOT / "results" / "export" / f"latency-{size}.json").read_text())["rows"]
    models: dict[str, list[str]] = {}
    for row in rows:
        times = f"{row['forward']['median']:.1f} / {row['end_to_end']['median']:.1f}"
        models.setdefault(Path(row["model"]).stem, []).append(times)
    for model, times in models.items():
        assert f"| {model} | {' | '.join(times)} |" in README.split(f"| {size} px |")[1].split("\n\n")[0]


def test_engines() -> None:
    engines = json.loads((ROOT / "results" / "export" / "engines.json").read_text())["engines"]
    built = [row for row in engines if not row["refused"]]
    assert f"{len(built)} of {len(engines)} engines" in README


def test_attention_on_a_gpu() -> None:
    rows = json.loads((ROOT / "results" / "ops" / "h100-ela-hadamard.json").read_text())["rows"]
    section = README.split("### Attention on a GPU")[1].split("\n### ")[0]
    shown = re.findall(r"^\| (\d+) \| (.+) \|$", section, re.MULTILINE)
    assert [int(tokens) for tokens, _ in shown] == sorted({row["tokens"] for row in rows})
    for tokens, cells in shown:
        own = [row for row in rows if row["direction"] == "forward" and row["tokens"] == int(tokens) and row["graph"]]
        fused = next(row for row in own if row["form"] == "fused")
        best = min((row for row in own if row["mechanism"] == "softmax"), key=lambda row: row["graph"]["median"])
        ours, theirs = fused["graph"]["median"] * 1e3, best["graph"]["median"] * 1e3
        assert cells == f"{ours:.0f} | {fused['times_floor']:.2f} | {theirs:.0f} ({best['form']}) | {theirs / ours:.1f}"
