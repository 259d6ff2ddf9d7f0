"""The reader of pictures against pixels that are known: every mode and orientation, or a refusal that says why."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from visionattn.errors import DataError
from visionattn.pictures import image_size, load_image

SIZE = (30, 20)


def gradient(mode: str = "RGB") -> Image.Image:
    """A picture that no two turns of are equal."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    pixels = np.stack([x * 8, y * 12, 255 - x * 4 - y * 6], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def read_rgb(path: Path) -> np.ndarray:
    assert image_size(path) == load_image(path).shape[1::-1], "the header tells the size of what is read"
    return load_image(path)[..., ::-1]


MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "tif": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"),
    "bmp": ("1", "L", "P", "RGB"),
}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_modes(tmp_path: Path, suffix: str, mode: str) -> None:
    image = gradient(mode)
    image.save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_rgb(tmp_path / f"a.{suffix}"), np.asarray(image.convert("RGB")))


def test_a_jpeg_of_four_inks_is_no_negative(tmp_path: Path) -> None:
    gradient("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    assert np.abs(read_rgb(tmp_path / "a.jpg").astype(int) - np.asarray(gradient())).mean() < 3


TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg", "avif"])
def test_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}, "avif": {"quality": 100}}
    path = tmp_path / f"a.{suffix}"
    gradient().save(path, exif=exif, **options.get(suffix, {}))
    found, expected = read_rgb(path), TURNS[orientation](np.asarray(gradient()))
    assert found.shape == expected.shape
    lossy = {"jpg": 3, "avif": 16}  # a turn to another side would be up to 255 off
    assert np.abs(found.astype(int) - expected).max() <= lossy.get(suffix, 0)


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_read_by_their_upper_eight_or_refused(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, shape, np.uint16)
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), pixels)
    found = load_image(path)
    assert np.array_equal(found, np.broadcast_to((pixels >> 8).reshape(20, 30, -1), found.shape))
    cv2.imwrite(str(path), pixels >> 4)
    with pytest.raises(DataError, match=r"brightest of its 16-bit pixels is 40\d\d of 65535.*8-bit PNG"):
        load_image(path)


@pytest.mark.parametrize(("kind", "mode"), [("f4", "F"), ("i4", "I")])
def test_32_bits_have_no_plain_meaning(tmp_path: Path, kind: str, mode: str) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((20, 30), kind)).save(path)
    with pytest.raises(DataError, match=f"mode {mode}.*convert it to an 8-bit PNG or JPEG"):
        load_image(path)
    with pytest.raises(DataError, match=f"mode {mode}"):
        image_size(path)


@pytest.mark.parametrize("kind", ["GIF", "PPM", "TGA", "ICO", "PCX", "DDS", "SGI", "EPS"])
def test_another_format_under_the_name_of_a_known_one(tmp_path: Path, kind: str) -> None:
    gradient().save(tmp_path / "a.jpg", kind)
    with pytest.raises(DataError, match=f"its content is {kind}, whatever its name says"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp"])
def test_a_picture_that_was_cut_short(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"a\.\w+: cannot be read as an image .*; replace or remove the file"):
        load_image(path)


def test_bytes_after_the_end_do_no_harm(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.jpg")
    whole = load_image(tmp_path / "a.jpg")
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(b"of a telephone")
    assert np.array_equal(load_image(tmp_path / "a.jpg"), whole)


def test_a_known_format_under_another_name_is_read(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.jpg", "PNG")
    assert np.array_equal(read_rgb(tmp_path / "a.jpg"), np.asarray(gradient()))


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_pictures_of_one_row_or_column(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").reshape(-1, 3).tolist() == [[9, 8, 7]] * max(size)


def test_a_name_in_another_script(tmp_path: Path) -> None:
    path = tmp_path / "рыба 魚 🐟" / "é.png"
    path.parent.mkdir()
    gradient().save(path)
    assert np.array_equal(read_rgb(path), np.asarray(gradient()))


def test_very_large_pictures(tmp_path: Path) -> None:
    """178 megapixels are within PIL's bounds; beyond, where a file could be a bomb, it is an error of ours."""
    Image.new("1", (13_000, 13_700)).save(tmp_path / "large.png")
    with pytest.warns(Image.DecompressionBombWarning):
        assert image_size(tmp_path / "large.png") == (13_000, 13_700)
    Image.new("1", (13_000, 13_900)).save(tmp_path / "bomb.png")
    for read in (image_size, load_image):
        with pytest.raises(DataError, match=r"bomb\.png: cannot be read as an image .*decompression bomb"):
            read(tmp_path / "bomb.png")
