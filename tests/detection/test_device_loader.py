"""Batches made on the device: boxes against painted pixels; warps, boxes and colours against Ultralytics and OpenCV."""

import random
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from ultralytics.data import augment
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.instance import Instances

from visionattn.detection import device_loader
from visionattn.detection.device_loader import UNSUPPORTED, DeviceLoader, Warp, inverse, refuse_unsupported
from visionattn.errors import ConfigError

SIDE = 96
OFF = {"hsv_h": 0, "hsv_s": 0, "hsv_v": 0, "mosaic": 0, "translate": 0, "scale": 0, "fliplr": 0, "imgsz": SIDE}
STRONG = {"degrees": 40, "shear": 10, "scale": 0.5, "translate": 0.2, "fliplr": 0.5, "flipud": 0.5}


class Set:
    """Stands for Ultralytics' data set: pictures (BGR), longest side ``SIDE``, and their boxes in pixels."""

    cache = "ram"  # Ultralytics picks any picture

    def __init__(self, pictures, boxes, classes):
        self.pictures = pictures
        self.im_files = [f"{number}.png" for number in range(len(pictures))]
        self.labels = []
        for picture, corners, names in zip(pictures, boxes, classes, strict=True):
            corners = np.reshape(corners, (-1, 2, 2)) / (picture.shape[1], picture.shape[0])
            both = np.concatenate([corners.mean(1), corners[:, 1] - corners[:, 0]], 1)
            self.labels.append({"bboxes": both.astype(np.float32), "cls": np.reshape(names, (-1, 1))})

    def __len__(self):
        return len(self.pictures)

    def load_image(self, index):
        return self.pictures[index], None, self.pictures[index].shape[:2]

    def get_image_and_label(self, index):
        picture, label = self.pictures[index], self.labels[index]
        boxes = Instances(label["bboxes"].copy(), np.zeros((0, 1000, 2)), bbox_format="xywh", normalized=True)
        shape = {"ori_shape": picture.shape[:2], "resized_shape": picture.shape[:2]}
        return {"img": picture, "cls": label["cls"], "instances": boxes, "im_file": self.im_files[index], **shape}


def sizes(rng, count):
    """Widths and heights, wide, high and square."""
    short = rng.integers(SIDE // 2, SIDE, count)
    return [[(SIDE, s), (s, SIDE), (SIDE, SIDE)][number % 3] for number, s in enumerate(short)]


def painted(count=60):
    """Black pictures, each with two rectangles of colours and classes that no other rectangle has; and the colours."""
    rng = np.random.default_rng(0)
    levels = np.linspace(0, 255, 7).round().astype(int)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    colours = rng.permutation(colours[colours.max(1) == 255])[: 2 * count]  # none is another one that is blended
    assert len(colours) == 2 * count
    pictures, boxes, classes = [], [], []
    for number, (width, height) in enumerate(sizes(rng, count)):
        picture = np.zeros((height, width, 3), np.uint8)
        found = []
        for part in range(2):  # one in each half
            w, h = rng.integers(14, width // 2 - 2), rng.integers(14, height)
            x, y = part * (width // 2) + rng.integers(1, width // 2 - w), rng.integers(0, height - h + 1)
            picture[y : y + h, x : x + w] = colours[2 * number + part][::-1]
            found.append((x, y, x + w, y + h))
        pictures.append(picture)
        boxes.append(found)
        classes.append([2 * number, 2 * number + 1])
    return Set(pictures, boxes, classes), colours


def smooth(count=12, boxes=6):
    """Pictures without edges, and boxes of all sizes, tiny ones and slivers among them."""
    rng = np.random.default_rng(1)
    pictures, corners, classes = [], [], []
    for width, height in sizes(rng, count):
        noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)), (0, 0), 4)
        pictures.append((127 + 600 * noise).clip(0, 255).astype(np.uint8))
        extent = np.exp(rng.uniform(np.log(1.5), np.log([width, height]), (boxes, 2)))
        low = rng.uniform(0, [width, height] - extent)
        corners.append(np.concatenate([low, low + extent], 1))
        classes.append(rng.integers(0, 9, boxes))
    return Set(pictures, corners, classes)


def loader(dataset, device="cpu", batch=16, rank=-1, world=1, **changed):
    options = SimpleNamespace(**{**DEFAULT_CFG_DICT, **OFF, **changed})
    return DeviceLoader(dataset, batch, torch.device(device), options, rank, world)


def assert_boxes_enclose_paint(made, colours, pixel):
    """All pixels of a colour lie in the box of its class, and boxes that the frame does not cut are no larger."""
    seen = tight = 0
    corners = np.concatenate(
        [label["bboxes"] * made.sizes[n].repeat(2).cpu().numpy() for n, label in enumerate(made.dataset.labels)]
    )
    draw, drawn = made._draw, []
    made._draw = lambda chosen: drawn.append(draw(chosen)) or drawn[-1]
    for batch in made:
        once = [len(set(images)) == 4 for images in drawn[-1].images.tolist()]
        areas = corners[:, 2:].prod(1) * drawn[-1].scale.square()[:, None].cpu().numpy()
        images = batch["img"].cpu().permute(0, 2, 3, 1).numpy().astype(int)
        assert images.shape[1:] == (SIDE, SIDE, 3)
        x, y, w, h = (batch["bboxes"].cpu().double() * SIDE).unbind(1)
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1).numpy()
        names, places = batch["cls"].cpu().flatten().numpy(), batch["batch_idx"].cpu().numpy()
        assert ((boxes > -1e-3) & (boxes < SIDE + 1e-3)).all()
        for number, image in enumerate(images):
            if not once[number]:
                continue  # a picture that is there twice has each colour twice
            for name, colour in enumerate(colours):
                rows, columns = (abs(image - colour).max(-1) < 4).nonzero()
                mine = boxes[(names == name) & (places == number)]
                if not len(mine):  # narrower than two pixels, or a tenth of what it was
                    thin = not len(rows) or min(np.ptp(rows), np.ptp(columns)) < 2
                    assert thin or len(rows) < 0.1 * areas[number, name] + 1, "paint without a box"
                    continue
                (box,) = mine
                whole = box.min() > 0.5 and box.max() < SIDE - 0.5
                assert len(rows) or not whole, "a box without paint"  # what the frame cuts may be an empty corner of it
                if len(rows):
                    extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                    out = (extent - box) * [-1, -1, 1, 1]
                    assert out.max() < 0.75, (extent, box)
                    seen += 1
                    if whole:
                        assert -out.min() < pixel, (extent, box)
                        tight += 1
    assert seen > 50
    assert tight > 20


@pytest.mark.parametrize(
    ("options", "pixel"),
    [
        ({}, 1.0),
        ({"fliplr": 0.5, "flipud": 0.5, "translate": 0.3}, 1.5),
        ({"mosaic": 1.0}, 1.5),
        ({"mosaic": 1.0, "scale": 0.5, "fliplr": 1.0}, 2.5),
        ({"mosaic": 0.5, **STRONG}, 4.0),  # corners of turned rectangles are blended away
    ],
    ids=["plain", "flips", "mosaic", "scales", "all"],
)
def test_boxes_enclose_what_was_painted(options, pixel):
    dataset, colours = painted()
    assert_boxes_enclose_paint(loader(dataset, **options), colours, pixel)


def by_ultralytics(dataset, chosen, seam, monkeypatch):
    """A canvas of twice the side, with boxes, as Ultralytics lays it of four pictures."""
    mosaic = augment.Mosaic(dataset, imgsz=SIDE, p=1.0, n=4)
    mosaic.get_indexes = lambda: chosen[1:]
    labels, seams = dataset.get_image_and_label(chosen[0]), iter(seam[::-1])  # of rows, then of columns
    with monkeypatch.context() as patch:
        patch.setattr(random, "uniform", lambda *_: next(seams))
        params = mosaic.get_params(labels)
    return mosaic.apply_instances(mosaic.apply_image(labels, params), params)


def four(dataset, chosen, seam, matrix, scale):
    """The same four pictures as a warp."""
    shift = [
        (seam[0] - (number % 2 == 0) * width, seam[1] - (number < 2) * height)
        for number, (height, width, _) in enumerate(dataset.pictures[index].shape for index in chosen)
    ]
    return Warp(
        torch.tensor([list(chosen)]),
        torch.tensor([shift], dtype=torch.float32),
        torch.tensor([seam], dtype=torch.float32),
        torch.tensor(matrix[None, :2], dtype=torch.float32),
        torch.tensor([scale], dtype=torch.float32),
    )


def scenes(monkeypatch, count=12):
    """Mosaics with Ultralytics' matrix: what it gets, as it lays it, and our warp."""
    random.seed(0)
    dataset, rng = smooth(), np.random.default_rng(0)
    affine = augment.RandomPerspective(degrees=40, translate=0.2, scale=0.5, shear=10, size=(SIDE, SIDE))
    for _ in range(count):
        chosen = rng.integers(0, len(dataset), 4)
        seam = rng.integers(SIDE // 2, SIDE + SIDE // 2, 2).tolist()
        laid = by_ultralytics(dataset, chosen, seam, monkeypatch)
        matrix, scale = affine._compute_affine_matrix(laid["img"], (SIDE, SIDE))
        yield dataset, affine, laid, matrix, scale, four(dataset, chosen, seam, matrix, scale)


def warped(made, warp):
    return device_loader.warped(made.images, made.sizes, warp, inverse(warp.matrix), SIDE)


def by_opencv(canvas, matrix, interpolation=cv2.INTER_LINEAR):
    """OpenCV puts pixels at whole numbers; here they are squares, and their middles are at halves."""
    moved = matrix[:2].astype(float).copy()
    moved[:, 2] += moved[:, :2].sum(1) / 2 - 0.5
    return cv2.warpAffine(canvas, moved, (SIDE, SIDE), flags=interpolation, borderValue=(114,) * 4)


def assert_pixels_agree(image, canvas, tiles, matrix):
    """Compare where no edge of a picture is near; tiles: number of the picture at each place of the canvas."""
    around = np.ones((5, 5), np.uint8)
    inner = (cv2.dilate(tiles, around) == cv2.erode(tiles, around)).astype(np.uint8) * (1 + tiles)
    inner[[0, 1, -2, -1]] = inner[:, [0, 1, -2, -1]] = 0
    there = by_opencv(cv2.copyMakeBorder(inner, 0, 0, 0, 0, cv2.BORDER_CONSTANT), matrix, cv2.INTER_NEAREST)
    there[there == 114] = 0
    expected = by_opencv(canvas, matrix).astype(float)
    found = image.permute(1, 2, 0).numpy()[..., ::-1]
    assert (there > 0).mean() > 0.4
    assert abs(found - expected)[there > 0].max() < 2.5  # OpenCV takes places in 32nds of a pixel
    assert abs(found - expected)[there > 0].mean() < 0.5
    assert (found[there == 1] == 114).all()


def test_mosaics_are_those_of_ultralytics_and_opencv(monkeypatch):
    for dataset, _, laid, matrix, _, warp in scenes(monkeypatch):
        made = loader(dataset)
        (x, y), names = warp.seam[0].int().tolist(), np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
        for number, (left, top) in enumerate(warp.shift[0].int().tolist()):
            height, width, _ = dataset.pictures[warp.images[0, number]].shape
            inside = np.zeros_like(names)
            inside[max(top, 0) : top + height, max(left, 0) : left + width] = number + 1
            inside[slice(y, None) if number < 2 else slice(y)] = 0
            inside[:, slice(x, None) if number % 2 == 0 else slice(x)] = 0
            names += inside
        assert_pixels_agree(warped(made, warp)[0], laid["img"], names, matrix)


def test_single_pictures_are_those_of_opencv():
    dataset = smooth()
    made = loader(dataset, batch=12, **STRONG)
    warp = made._draw(torch.arange(12))
    for number, image in enumerate(warped(made, warp)):
        picture = dataset.pictures[number]
        canvas = np.full((2 * SIDE, 2 * SIDE, 3), 114, np.uint8)
        tiles = np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
        left, top = warp.shift[number, 0].int().tolist()
        assert abs(left + picture.shape[1] / 2 - SIDE) <= 0.5
        assert abs(top + picture.shape[0] / 2 - SIDE) <= 0.5
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        tiles[top : top + picture.shape[0], left : left + picture.shape[1]] = 1
        assert_pixels_agree(image, canvas, tiles, warp.matrix[number].numpy())


def test_boxes_that_stay_are_those_of_ultralytics(monkeypatch):
    kept = dropped = 0
    for dataset, affine, laid, matrix, scale, warp in scenes(monkeypatch, 40):
        shape = laid["img"].shape[:2]
        params = {"M": matrix, "scale": scale, "orig_shape": shape, "size": (SIDE, SIDE)}
        expected = affine.apply_instances({"cls": laid["cls"], "instances": laid["instances"]}, params)
        expected["instances"].convert_bbox("xywh")
        made = loader(dataset)
        boxes, stay = device_loader.warped_boxes(made.boxes[warp.images], warp, SIDE)
        found = boxes[stay].numpy() * SIDE
        assert len(found) == len(expected["cls"])
        np.testing.assert_allclose(found, expected["instances"].bboxes, atol=1e-3)
        names = made.classes[warp.images].flatten(1)[stay]
        assert names.tolist() == expected["cls"].flatten().tolist()
        kept += len(found)
        dropped += 24 - len(found)
    assert min(kept, dropped) > 100


def test_slivers_and_leftovers_are_dropped_as_by_ultralytics():
    side, rng = 640, np.random.default_rng(0)
    extent = np.exp(rng.uniform(np.log(1), np.log(600), (4000, 2)))
    low = rng.uniform(-extent, side)
    boxes = torch.tensor(np.concatenate([low, low + extent], 1) + side / 2, dtype=torch.float32)
    still = torch.tensor([[[1.0, 0, -side / 2], [0, 1.0, -side / 2]]])
    warp = Warp(torch.zeros(1, 1), torch.zeros(1, 1, 2), torch.full((1, 2), 2.0 * side), still, torch.ones(1))
    kept = device_loader.warped_boxes(boxes[None, None], warp, side)[1][0].numpy()
    before = np.concatenate([low, low + extent], 1).clip(-side / 2, 1.5 * side)
    expected = augment.RandomPerspective.box_candidates(before.T, before.clip(0, side).T)
    assert (kept == expected).all()
    ratio = (extent.max(1) / extent.min(1))[extent.min(1) > 2.1]
    assert (ratio > 105).sum() > 10, "or slivers are not tried"


@pytest.mark.parametrize("gains", [(0, 0, 0), (0.5, 0, 0), (-0.2, 0.6, 0), (0.015, -0.7, 0.4), (1.0, 1.0, -0.8)])
def test_colours(gains, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels[0] = pixels[0, :, :1]  # greys
    pixels[1:3] = [[[0, 0, 0]], [[255, 255, 255]]]
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    found = device_loader.recoloured(tensor, torch.tensor([gains], dtype=torch.float32))
    assert found.dtype == torch.uint8
    image = found[0].permute(1, 2, 0).numpy().astype(int)

    hue, saturation, value = np.moveaxis(rgb_to_hsv(pixels / 255.0), -1, 0)
    changed = [(hue + gains[0]) % 1, (saturation * (1 + gains[1])).clip(0, 1), (value * (1 + gains[2])).clip(0, 1)]
    exact = 255 * hsv_to_rgb(np.stack(changed, -1))
    assert abs(image - exact).max() < 0.51

    with monkeypatch.context() as patch:
        patch.setattr(np.random, "uniform", lambda *_: np.array(gains))
        labels = {"img": np.ascontiguousarray(pixels[..., ::-1])}
        theirs = augment.RandomHSV(1, 1, 1).apply_image(labels)["img"][..., ::-1].astype(int)
    assert abs(image - theirs).mean() < 2  # a hue has 180 values there, and all is rounded down
    assert abs(image - theirs).max() < 20


def test_draws_are_as_wide_as_the_options_say():
    made = loader(smooth(), degrees=30, scale=0.4, translate=0.1, fliplr=0.25, flipud=0.0, mosaic=0.75)
    warp = made._draw(torch.zeros(4000, dtype=torch.long))
    linear = warp.matrix[:, :, :2].double()
    determinant = linear.det()
    scale = determinant.abs().sqrt()
    torch.testing.assert_close(scale, warp.scale.double(), rtol=1e-5, atol=1e-5)
    assert 0.6 <= scale.min() < 0.61
    assert 1.39 < scale.max() <= 1.4
    flipped = determinant < 0
    assert flipped.double().mean() == pytest.approx(0.25, abs=0.03)
    angle = torch.rad2deg(torch.atan2(-linear[:, 1, 0], linear[:, 1, 1]))  # the second row is not mirrored
    assert 29 < angle.max() <= 30.001
    assert -30.001 <= angle.min() < -29
    middle = (warp.matrix @ torch.tensor([SIDE, SIDE, 1.0])) / SIDE
    assert (middle - 0.5).abs().max() <= 0.1 + 1e-4
    assert (middle - 0.5).abs().max() > 0.099
    assert (warp.seam[:, 0] < 2 * SIDE).double().mean() == pytest.approx(0.75, abs=0.03)
    seams = warp.seam[warp.seam[:, 0] < 2 * SIDE]
    assert (seams.min(), seams.max()) == (SIDE // 2, SIDE + SIDE // 2 - 1)
    assert len(warp.images[:, 1:].unique()) == 12


def test_a_scale_may_be_a_range():
    scale = loader(smooth(), scale=[0.5, 0.75])._draw(torch.zeros(1000, dtype=torch.long)).scale
    assert 0.5 <= scale.min() < 0.51
    assert 0.74 < scale.max() <= 0.75


def test_reset_ends_mosaics():
    dataset, _ = painted(20)
    made = loader(dataset, mosaic=1.0)

    def pictures():
        """The pictures whose boxes are in each input, and the one that it is called after."""
        for batch in made:
            for number, file in enumerate(batch["im_file"]):
                yield set((batch["cls"][batch["batch_idx"] == number] // 2).int().flatten().tolist()), int(file[:-4])

    assert sum(len(found) > 1 for found, _ in pictures()) > 10
    made.reset()
    assert all(found == {file} for found, file in pictures())


def test_epochs_and_processes_draw_anew():
    dataset, drawn = smooth(), []
    for seed, epoch, rank in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)):
        made = loader(dataset, rank=rank, world=2, seed=seed, **STRONG)
        made.epoch, draw = epoch, made._draw
        made._draw = lambda chosen, draw=draw: drawn.append(draw(chosen)) or drawn[-1]
        assert len(list(made)) == 1
    angles = torch.stack([torch.atan2(warp.matrix[:, 1, 0], warp.matrix[:, 1, 1]).abs() for warp in drawn])
    assert len(angles.flatten().unique()) == 4 * 6


def files_of(batches):
    return [file for batch in batches for file in batch["im_file"]]


def test_an_epoch_is_the_same_again_and_unlike_others():
    dataset, _ = painted(20)
    first, again = (list(loader(dataset, mosaic=1.0, hsv_v=0.4, batch=8, **STRONG)) for _ in range(2))
    assert [len(batch["img"]) for batch in first] == [8, 8, 4]
    assert len(loader(dataset, batch=8)) == 3
    for one, two in zip(first, again, strict=True):
        assert one["im_file"] == two["im_file"]
        assert all(torch.equal(one[key], two[key]) for key in ("img", "cls", "bboxes", "batch_idx"))
    for changed in ({"epoch": 1}, {"seed": 1}):
        made = loader(dataset, mosaic=1.0, hsv_v=0.4, batch=8, **STRONG, seed=changed.get("seed", 0))
        made.epoch = changed.get("epoch", 0)
        other = list(made)
        assert [batch["im_file"] for batch in other] != [batch["im_file"] for batch in first]
        assert sorted(files_of(other)) == sorted(dataset.im_files)


@pytest.mark.parametrize(("count", "world"), [(20, 2), (21, 2), (20, 3)])
def test_processes_share_an_epoch(count, world):
    dataset, _ = painted(count)
    shares = []
    for rank in range(world):
        made = loader(dataset, batch=4, rank=rank, world=world)
        made.epoch = 3
        shares.append(files_of(made))
        assert len(made) == len(list(made))
    assert len({len(share) for share in shares}) == 1, "or one waits for the other forever"
    together = [file for share in shares for file in share]
    assert set(together) == set(dataset.im_files)
    assert len(together) - count == -count % world


def test_pictures_without_boxes():
    pictures = [np.full((SIDE, SIDE, 3), 50, np.uint8)] * 3
    for batch in loader(Set(pictures, [[], [], []], [[], [], []]), mosaic=1.0):
        assert batch["bboxes"].shape == (0, 4)
        assert batch["cls"].shape == (0, 1)
        assert batch["batch_idx"].shape == (0,)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_done_is_refused(name):
    with pytest.raises(ConfigError, match=f"loader: device does no {name}; .*loader: workers"):
        loader(smooth(), **{name: 0.5})


def test_all_refused_options_are_named():
    refuse_unsupported(DEFAULT_CFG_DICT)
    with pytest.raises(ConfigError, match="does no mixup, bgr, augment;"):
        refuse_unsupported({"mixup": 0.1, "cutmix": 0.0, "bgr": 1.0, "augmentations": [object()]})
