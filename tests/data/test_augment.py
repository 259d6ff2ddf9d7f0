import json
import subprocess
import sys
from typing import Any

import albumentations as A
import numpy as np
import pytest

from visionattn.data import build_augment
from visionattn.errors import ConfigError

SPECS: list[dict[str, dict[str, Any]]] = [
    {"HorizontalFlip": {"p": 1.0}},
    {"RandomBrightnessContrast": {"brightness_limit": [-0.2, 0.2], "p": 0.5}},
    {"Rotate": {"limit": 20}},
    {"GaussianBlur": {}},
]


def test_built_by_name_in_order() -> None:
    built = build_augment(SPECS)
    assert [type(t) for t in built] == [A.HorizontalFlip, A.RandomBrightnessContrast, A.Rotate, A.GaussianBlur]
    assert built[1].p == 0.5
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(A.Compose(built[:1])(image=image)["image"], image[:, ::-1])


def test_empty_list() -> None:
    assert build_augment([]) == []


def test_round_trip_through_a_checkpoint() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    built = build_augment(SPECS)
    stored = json.loads(json.dumps([A.to_dict(t) for t in built]))
    again = [A.from_dict(entry) for entry in stored]
    one, other = (A.Compose(transforms, seed=3)(image=image)["image"] for transforms in (built, again))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, image)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"HorizontalFlop": {}}, "nearest: HorizontalFlip"),
        ({"DualTransform": {}}, "unknown transform"),
        ({"Compose": {}}, "unknown transform"),
        ({"HorizontalFlip": {"chance": 0.5}}, "chance.*its arguments are: p"),
        ({"GaussianBlur": {"blur": 3}}, "blur.*its arguments are: blur_limit"),
        ({"HorizontalFlip": {"p": 5}}, "p: input should be less than or equal to 1"),
        ({"GaussianBlur": {"blur_limit": "wide"}}, "GaussianBlur: blur_limit"),
        ({"Resize": {}}, "height: field required"),
        ({"Lambda": {}}, "Lambda cannot be used"),
        ({"Normalize": {}}, "Normalize cannot be used"),
        ({"FDA": {}}, "FDA cannot be reliably serialized"),
        ({"HorizontalFlip": {}, "VerticalFlip": {}}, "expected one name"),
        ({}, "expected one name"),
    ],
)
def test_refused(spec: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_augment([spec])


def test_import_is_silent_and_asks_no_server() -> None:
    code = """
import socket
def refuse(*_):
    raise SystemExit("asked a server")
socket.socket.connect = refuse
from visionattn.data import build_augment
build_augment([{"HorizontalFlip": {}}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
