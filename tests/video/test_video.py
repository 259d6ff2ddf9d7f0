import logging
import weakref

import cv2
import numpy as np
import pytest
from PIL import Image

from visionattn.deployment import Detections
from visionattn.errors import ConfigError, SourceError, UnsupportedError
from visionattn.video import Source, open_source, predict, sink
from visionattn.video.draw import draw

NAMES = {0: "ant", 1: "bee"}


class FakeRunner:
    """Finds one ant and one bee in every frame."""

    task = "detect"
    names = NAMES
    imgsz = 64
    device = "cpu"
    calls = 0

    def __call__(self, images):
        self.calls += 1
        boxes = np.array([[20, 40, 60, 80], [70, 30, 110, 90]], np.float32)
        return [Detections(boxes, np.array([0.9, 0.5], np.float32), np.array([0, 1])) for _ in images]


class FakeClassifier(FakeRunner):
    task = "classify"

    def __call__(self, images):
        return [np.array([0.2, 0.8], np.float32) for _ in images]


def grey(value, width=128, height=96):
    return np.full((height, width, 3), value, np.uint8)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    cv2.imwrite(str(folder / "b.png"), grey(20))
    cv2.imwrite(str(folder / "a.jpg"), grey(10, 130, 100))
    cv2.imwrite(str(folder / "more" / "c.bmp"), grey(30))
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def clip(tmp_path):
    """Twelve frames of 128 x 96 at 10 per second; the grey of frame i is 20 * i."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (128, 96))
    for i in range(12):
        writer.write(grey(20 * i))
    writer.release()
    return path


@pytest.fixture
def animation(tmp_path):
    path = tmp_path / "animation.gif"
    frames = [Image.fromarray(grey(40 * i)) for i in range(6)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


class TestSource:
    def test_picture(self, pictures):
        source = open_source(str(pictures / "b.png"))
        (name, frame), *rest = source
        assert (source.kind, source.name, source.count, name, rest) == ("image", "b", 1, "b.png", [])
        np.testing.assert_array_equal(frame, grey(20))

    def test_folder_in_order_and_with_its_folders(self, pictures):
        source = open_source(str(pictures))
        frames = dict(source)
        assert (source.kind, source.name, source.count) == ("folder", "pictures", 3)
        assert list(frames) == ["a.jpg", "b.png", "more/c.bmp"]
        assert frames["a.jpg"].shape == (100, 130, 3)

    def test_video_frames_in_order(self, clip):
        source = open_source(str(clip))
        assert (source.kind, source.name, source.count, source.fps) == ("video", "clip", 12, 10)
        means = [frame.mean() for _, frame in source]
        np.testing.assert_allclose(means, np.arange(12) * 20, atol=3)

    def test_gif(self, animation):
        source = open_source(str(animation))
        assert (source.kind, source.fps) == ("video", 10)
        means = [frame.mean() for _, frame in source]
        np.testing.assert_allclose(means, np.arange(6) * 40, atol=5)

    def test_broken_picture_of_a_folder_is_named_and_left_out(self, pictures, caplog):
        (pictures / "broken.png").write_bytes(b"no picture")
        with caplog.at_level(logging.WARNING, "visionattn"):
            assert len(list(open_source(str(pictures)))) == 3
        assert "broken.png" in caplog.text

    def test_truncated_video_is_warned_of(self, tmp_path, clip, caplog):
        whole = clip.read_bytes()
        cut = tmp_path / "cut.avi"
        cut.write_bytes(whole[: len(whole) * 2 // 3])
        with caplog.at_level(logging.WARNING, "visionattn"):
            assert 0 < len(list(open_source(str(cut)))) < 12
        assert "of about 12 frames" in caplog.text

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda p: p / "missing.mp4", "source not found"),
            (lambda p: p / "notes.txt", "neither as a picture nor as a video"),
            (lambda p: p / "damaged.mp4", "neither as a picture nor as a video"),
            (lambda p: p / "empty", "no pictures in"),
            (lambda p: "97", "camera 97 cannot be opened"),
        ],
    )
    def test_what_is_not_there_or_no_picture(self, pictures, make, message, capfd):
        (pictures / "empty").mkdir()
        (pictures / "damaged.mp4").write_bytes(b"no video" * 100)
        with pytest.raises(SourceError, match=message):
            open_source(str(make(pictures)))
        assert "WARN" not in capfd.readouterr().err

    @pytest.mark.parametrize("names", [["x.png"], ["x.png", "y.jpg"]])
    def test_no_picture_can_be_read(self, tmp_path, names):
        for name in names:
            (tmp_path / name).write_bytes(b"no picture")
        with pytest.raises(SourceError, match=r"x\.png" if len(names) == 1 else "none of the 2 pictures"):
            list(open_source(str(tmp_path / names[0] if len(names) == 1 else tmp_path)))


class TestDraw:
    def test_box_lines_are_where_the_box_is(self):
        frame = grey(0)
        drawn = draw(frame, FakeRunner()([frame])[0], NAMES)
        assert frame.max() == 0
        for x, y in ((20, 60), (60, 60), (40, 80), (70, 60), (110, 60)):
            assert drawn[y, x].any()
        for x, y in ((40, 60), (90, 60), (5, 60), (120, 60), (64, 90)):
            assert not drawn[y, x].any()
        assert (drawn[60, 20] != drawn[60, 70]).any()  # a colour a class

    def test_labels_stay_inside_the_frame(self):
        frame = grey(0)
        at_top = Detections(np.array([[10, 0, 60, 90]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64))
        assert (draw(frame, at_top, NAMES)[2:12, 14:40] > 0).mean() > 0.5

    def test_nothing_found(self):
        nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
        np.testing.assert_array_equal(draw(grey(7), nothing, NAMES), grey(7))

    def test_class_is_written_in_the_corner(self):
        drawn = draw(grey(0), np.array([0.1, 0.9], np.float32), NAMES)
        assert drawn[:16, :32].any()
        assert not drawn[40:].any()


class TestPredict:
    def test_folder(self, pictures, tmp_path):
        output = tmp_path / "out"
        summary = predict(FakeRunner(), open_source(str(pictures)), output)
        assert summary.frames == 3
        assert summary.counts == {"ant": 3, "bee": 3}
        assert files_in(output) == ["a.jpg", "b.png", "more/c.bmp"]
        assert sorted(summary.paths) == [output / name for name in files_in(output)]
        drawn = cv2.imread(str(output / "b.png"))
        np.testing.assert_array_equal(drawn, draw(grey(20), FakeRunner()([0])[0], NAMES))

    def test_video(self, clip, tmp_path):
        output = tmp_path / "out"
        summary = predict(FakeRunner(), open_source(str(clip)), output)
        assert (summary.frames, summary.paths, files_in(output)) == (12, [output / "clip.mp4"], ["clip.mp4"])
        written = open_source(str(output / "clip.mp4"))
        assert (written.count, written.fps) == (12, 10)
        means = [frame[:, 115:].mean() for _, frame in written]  # right of the boxes
        np.testing.assert_allclose(means, np.arange(12) * 20, atol=6)

    def test_odd_sizes_lose_a_row_and_a_column(self, tmp_path):
        path = tmp_path / "odd.gif"
        frames = [Image.fromarray(grey(40 * i, 131, 97)) for i in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
        predict(FakeRunner(), open_source(str(path)), tmp_path / "out")
        assert [frame.shape for _, frame in open_source(str(tmp_path / "out" / "odd.mp4"))] == [(96, 130, 3)] * 3

    def test_classifier(self, pictures, tmp_path):
        summary = predict(FakeClassifier(), open_source(str(pictures)), tmp_path / "out")
        assert summary.counts == {"bee": 3}

    def test_times(self, pictures, tmp_path):
        summary = predict(FakeRunner(), open_source(str(pictures)), tmp_path / "out")
        assert 0 < summary.model_ms < summary.total_ms < 10_000

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_after_a_failure_no_half_video_is_left(self, clip, tmp_path, error):
        class Fails(FakeRunner):
            def __call__(self, images):
                if self.calls == 5:
                    raise error
                return super().__call__(images)

        with pytest.raises(error):
            predict(Fails(), open_source(str(clip)), tmp_path / "out")
        assert files_in(tmp_path / "out") == []

    @pytest.mark.parametrize("size", [0, 1000, 4000])
    def test_a_video_on_a_full_disk(self, clip, tmp_path, full_disk, size):
        source = open_source(str(clip))
        with full_disk(size), pytest.raises(SourceError, match=r"clip\.mp4 cannot be written: .*disk"):
            predict(FakeRunner(), source, tmp_path / "out")
        assert files_in(tmp_path / "out") == []

    def test_pictures_on_a_full_disk(self, pictures, tmp_path, full_disk):
        source = open_source(str(pictures))
        with full_disk(100), pytest.raises(OSError, match=r"a\.jpg"):
            predict(FakeRunner(), source, tmp_path / "out")
        assert files_in(tmp_path / "out") == []

    @pytest.mark.parametrize("what", ["b.png", "", "clip.avi"])
    def test_an_earlier_output_is_never_replaced(self, pictures, clip, tmp_path, what):
        text = str(clip if what == "clip.avi" else pictures / what)
        first = predict(FakeRunner(), open_source(text), tmp_path / "out")
        before = {path: path.read_bytes() for path in first.paths}
        runner = FakeRunner()
        with pytest.raises(ConfigError, match=r"would be replaced; give another --output folder"):
            predict(runner, open_source(text), tmp_path / "out")
        assert runner.calls == 0
        assert {path: path.read_bytes() for path in first.paths} == before

    @pytest.mark.parametrize("name", ["b.png", ""])
    def test_the_source_is_never_replaced(self, pictures, name):
        before = (pictures / "b.png").read_bytes()
        with pytest.raises(SourceError, match="is being read and would be replaced"):
            predict(FakeRunner(), open_source(str(pictures / name)), pictures)
        assert (pictures / "b.png").read_bytes() == before

    def test_camera_ends_by_ctrl_c_and_keeps_its_video(self, monkeypatch, tmp_path):
        class Camera:
            left = 4

            def isOpened(self):  # noqa: N802
                return True

            def get(self, _):
                return 0.0

            def read(self):
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
                return True, grey(50)

            def release(self):
                pass

        real = cv2.VideoCapture
        monkeypatch.setattr(cv2, "VideoCapture", lambda what: Camera() if what == 3 else real(what))
        source = open_source("3")
        assert (source.kind, source.name, source.count) == ("camera", "camera3", None)
        summary = predict(FakeRunner(), source, tmp_path)
        assert (summary.frames, summary.paths) == (4, [tmp_path / "camera3.mp4"])
        monkeypatch.undo()
        assert len(list(open_source(str(tmp_path / "camera3.mp4")))) == 4


class TestWindow:
    @pytest.fixture
    def screen(self, monkeypatch):
        """A display whose user presses the given keys; returns what is shown."""
        shown = []

        def prepare(*keys):
            pressed = iter(keys)
            monkeypatch.setattr(sink, "_check_windows", lambda: None)
            monkeypatch.setattr(cv2, "imshow", lambda title, frame: shown.append(frame), raising=False)
            monkeypatch.setattr(cv2, "waitKey", lambda delay: next(pressed), raising=False)
            monkeypatch.setattr(cv2, "getWindowProperty", lambda title, what: 1.0, raising=False)
            return shown

        return prepare

    def test_q_ends_a_video_whose_beginning_is_kept(self, clip, tmp_path, screen):
        shown = screen(-1, -1, ord("q"))
        summary = predict(FakeRunner(), open_source(str(clip)), tmp_path / "out", show=True)
        assert len(shown) == summary.frames == 3
        assert len(list(open_source(str(tmp_path / "out" / "clip.mp4")))) == 3

    def test_pictures_wait_for_a_key(self, pictures, tmp_path, screen):
        shown = screen(-1, -1, ord(" "), -1, ord("n"), -1, -1, 27)
        predict(FakeRunner(), open_source(str(pictures)), tmp_path / "out", show=True)
        assert len(shown) == 3

    def test_no_display_is_an_error_and_no_abort(self, pictures, tmp_path, monkeypatch):
        for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(variable, raising=False)
        with pytest.raises(UnsupportedError, match="no window can be opened"):
            predict(FakeRunner(), open_source(str(pictures)), tmp_path / "out", show=True)
        assert files_in(tmp_path / "out") == []


class TestFormats:
    def test_a_rate_that_is_no_whole_number_and_odd_sides(self, tmp_path):
        source = Source(
            "video", "ntsc", iter([(str(i), grey(40 * i, 131, 97)) for i in range(6)]), count=6, fps=30000 / 1001
        )
        predict(FakeRunner(), source, tmp_path / "out")
        written = open_source(str(tmp_path / "out" / "ntsc.mp4"))
        assert written.fps == pytest.approx(30000 / 1001, abs=1e-4)
        assert [frame.shape for _, frame in written] == [(96, 130, 3)] * 6

    @pytest.mark.parametrize("fps", [12.345678, 59.94, 7.0, 0.5])
    def test_other_rates(self, tmp_path, fps):
        source = Source("video", "v", iter([(str(i), grey(40 * i)) for i in range(4)]), count=4, fps=fps)
        predict(FakeRunner(), source, tmp_path / "out")
        assert open_source(str(tmp_path / "out" / "v.mp4")).fps == pytest.approx(fps, rel=1e-3)

    def test_a_video_that_says_it_is_turned_is_upright(self, tmp_path):
        path = tmp_path / "turned.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (128, 96))
        for _ in range(3):
            writer.write(np.vstack([grey(200, height=48), grey(20, height=48)]))
        writer.release()
        content = bytearray(path.read_bytes())
        matrix = content.index(b"tkhd") + 4 + 40  # of version 0: after its flags, times, layer and volume
        turn = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # a quarter to the right
        content[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
        path.write_bytes(content)
        frames = [frame for _, frame in open_source(str(path))]
        assert [frame.shape for frame in frames] == [(128, 96, 3)] * 3
        assert frames[0][:, 60:].mean() > 150 > 100 > frames[0][:, :36].mean()

    def test_frames_are_not_kept(self, tmp_path):
        alive, most = weakref.WeakSet(), 0

        class Frame(np.ndarray):
            __hash__ = object.__hash__

        def frames():
            nonlocal most
            for number in range(100):
                frame = grey(number).view(Frame)
                alive.add(frame)
                most = max(most, len(alive))
                yield str(number), frame
                del frame

        predict(FakeRunner(), Source("video", "long", frames(), count=100), tmp_path / "out")
        assert most <= 3
