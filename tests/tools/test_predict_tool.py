from tests.tools.conftest import process


def test_pictures_counts_and_speed(weights, data, tmp_path):
    source = data.parent / "images" / "val"
    done = process("predict", tmp_path, "--weights", weights, "--source", source, "--conf", 0, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    written = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert written == [f"runs/predict/val/{i}.png" for i in range(4)]
    assert "in 4 frames" in done.stdout
    assert "ms a frame in the model" in done.stdout
    assert "and 1 more" in done.stdout


def test_a_second_run_writes_beside_the_first(tool, weights, data, tmp_path):
    arguments = ("--weights", weights, "--source", data.parent / "images/val/1.png", "--conf", 0.9, "--device", "cpu")
    for _ in range(2):
        done = tool("predict", tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "runs/predict").iterdir()) == ["1", "1-2"]


def test_one_picture_without_finds_into_a_given_folder(tool, weights, data, tmp_path):
    source = data.parent / "images" / "val" / "2.png"
    done = tool("predict", tmp_path, "--weights", weights, "--source", source, "--conf", 1, "--output", "here")
    assert done.returncode == 0, done.stderr
    assert "found nothing in 1 frames" in done.stdout
    assert (tmp_path / "here" / "2.png").read_bytes() == source.read_bytes()


def test_an_error_is_one_line_and_code_2(tool, weights, tmp_path):
    done = tool("predict", tmp_path, "--weights", weights, "--source", "97")
    assert done.returncode == 2
    assert done.stderr.startswith("error: camera 97 cannot be opened")
    assert not list(tmp_path.iterdir())
