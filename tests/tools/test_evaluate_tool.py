import json

from tests.tools.conftest import process


def test_scores_are_printed_and_written(tool, weights, data, tmp_path):
    report = tmp_path / "report.json"
    done = tool("evaluate", tmp_path, "--weights", weights, "--data", data, "--device", "cpu", "--output", report)
    assert done.returncode == 0, done.stderr
    for word in ("AP50", "AP S", "ant", "bee", "4 images", str(report.name)):
        assert word in done.stdout
    written = json.loads(report.read_text())
    assert (written["task"], written["images"], written["device"], written["conf"]) == ("detect", 4, "cpu", 0.001)
    assert 0 <= written["scores"]["ap"] <= 1
    assert list(written["scores"]["per_class"]) == ["ant", "bee"]
    assert written["scores"]["ap_small"] == written["scores"]["ap"]  # all objects are small
    assert written["scores"]["ap_large"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_an_error_is_one_line_and_code_2(data, tmp_path):
    done = process("evaluate", tmp_path, "--weights", "missing.pt", "--data", data)
    assert done.returncode == 2
    assert done.stderr.startswith("error: weights not found: missing.pt")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
