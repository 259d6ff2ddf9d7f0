"""Images without labels: of a folder, a data set, or parquet files."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from visionattn.data.calibration import calibration_images
from visionattn.data.embedded import EMBEDDED
from visionattn.data.files import list_images
from visionattn.errors import DataError
from visionattn.pictures import load_image


class Unlabelled(Dataset[Tensor]):
    """Inputs of a model, (3, H, W), made of images whose labels nobody asks for.

    Args:
        images: paths, or encoded images.
        transform: makes an input of a PIL image.
    """

    def __init__(self, images: list[Path] | list[bytes], transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        source = self.images[index]
        if isinstance(source, bytes):
            try:
                return self.transform(Image.open(io.BytesIO(source)).convert("RGB"))
            except OSError as error:
                raise DataError(f"image {index} of the parquet files cannot be read ({error})") from error
        return self.transform(Image.fromarray(np.ascontiguousarray(load_image(source)[..., ::-1])))


def unlabelled_images(source: str) -> list[Path] | list[bytes]:
    """Return the images to learn from.

    Args:
        source: an embedded set or a data set, of which the train split counts; any other folder of images; or a
            ``.parquet`` file with a column ``image`` of encoded images, or several by a pattern such as
            ``train-*.parquet``, which needs pyarrow.

    Raises:
        DataError: there are none.
    """
    if source.endswith(".parquet"):
        return _of_parquet(source)
    place = Path(source)
    if source in EMBEDDED or place.suffix in (".yaml", ".yml") or (place / "train").is_dir():
        return list(calibration_images(source, 10**9))
    if (place / "data.yaml").is_file():
        return list(calibration_images(source, 10**9))
    found = list_images(place) if place.is_dir() else []
    if not found:
        raise DataError(
            f"no images in {source}; give a folder of images, a data set, an embedded set or .parquet files"
        )
    return found


def parquet_reader(source: str) -> Any:
    """Return the module that reads parquet files; ``source`` is what is read, for the error.

    Raises:
        DataError: pyarrow is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{source}: parquet files need pyarrow; pip install pyarrow") from error
    return parquet


def _of_parquet(source: str) -> list[bytes]:
    parquet = parquet_reader(source)
    files = sorted(Path(source).parent.glob(Path(source).name))
    try:
        cells = [cell for file in files for cell in parquet.read_table(file, columns=["image"])["image"].to_pylist()]
    except Exception as error:  # damaged files raise what they like
        raise DataError(f"{source} cannot be read, or has no column image ({error})") from error
    if not cells:
        raise DataError(f"no images in {source}; give a file, or a pattern of files that are there")
    return [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
