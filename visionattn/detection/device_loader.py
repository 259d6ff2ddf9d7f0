"""Small detection sets kept on the training device and augmented there.

Ultralytics augments on the CPU, in worker processes. On sets of some thousand images and with small networks that is
what takes the time. Here images lie on the device at network size, and a batch is a few dozen operations.
"""

import math
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from ultralytics.utils import NUM_THREADS

from visionattn.errors import ConfigError

PAD = 114
"""Grey of what no image covers."""

UNSUPPORTED = ("rect", "perspective", "mixup", "cutmix", "copy_paste", "bgr", "multi_scale")
"""Options of Ultralytics' training that this loader does not know; ``augmentations`` is refused, too."""

LEAST_SIDE, LEAST_AREA, LARGEST_RATIO = 2.0, 0.1, 100.0
"""A box is kept if it is wider and higher than so many pixels, keeps more than that share, and is no narrower."""


class Warp(NamedTuple):
    """How network inputs are cut out of a plane that tiles were laid on: of B inputs, four tiles each.

    Attributes:
        images: (B, 4) indices of images.
        shift: (B, 4, 2) where the upper left corner of each image lies on the plane, x and y.
        seam: (B, 2) where the tiles meet; the first is up left of it, then up right, down left, down right.
        matrix: (B, 2, 3) from the plane, whose side is twice that of an input, to the input.
        scale: (B,) of the matrix, without shear.
    """

    images: Tensor
    shift: Tensor
    seam: Tensor
    matrix: Tensor
    scale: Tensor


class DeviceLoader:
    """Batches for Ultralytics' trainer, made on its device: mosaic, affine warp, colour and flips as in its options.

    It stands where Ultralytics' loader stands. Draws come from a generator of its own, seeded anew for each ``epoch``,
    so that a resumed training sees what it would have seen.

    Args:
        dataset: an Ultralytics ``YOLODataset`` for training; its images are read once.
        batch: images of a batch.
        device: where images lie and batches are made.
        options: Ultralytics' training options.
        rank: of this process among ``world``, or -1.
        world: how many processes share an epoch.

    Raises:
        ConfigError: an option asks for an augmentation that is not done here, or the images do not fit.
    """

    num_workers = 0
    drop_last = False

    def __init__(
        self, dataset: Any, batch: int, device: torch.device, options: Any, rank: int = -1, world: int = 1
    ) -> None:
        refuse_unsupported(vars(options))
        self.dataset, self.batch_size, self.device, self.options = dataset, batch, device, options
        self.imgsz = int(options.imgsz)
        self.mosaic = float(options.mosaic)
        self.images, self.sizes = _load_images(dataset, self.imgsz, device)
        self.boxes, self.classes = _load_boxes(dataset, self.sizes)
        self.generator = torch.Generator(device=device)
        self._paint: Any = torch.compile(paint, dynamic=False) if device.type == "cuda" else paint
        self.epoch = 0
        self.sampler = _Shuffled(len(dataset), int(options.seed), max(rank, 0), world)

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank = self.sampler.rank
        self.generator.manual_seed((int(self.options.seed) * 1_000_003 + self.epoch) * 64 + rank)
        order = self.sampler.order(self.epoch)
        files = [self.dataset.im_files[index] for index in order.tolist()]
        for number, chosen in enumerate(torch.split(order.to(self.device), self.batch_size)):
            start = number * self.batch_size
            yield self._batch(chosen) | {"im_file": files[start : start + len(chosen)]}

    def reset(self) -> None:
        """Stop laying mosaics: Ultralytics calls this when the last epochs begin."""
        self.mosaic = 0.0

    def _batch(self, chosen: Tensor) -> dict[str, Tensor]:
        warp = self._draw(chosen)
        boxes, kept = warped_boxes(self.boxes[warp.images], warp, self.imgsz)
        ranges = torch.tensor([self.options.hsv_h, self.options.hsv_s, self.options.hsv_v]).to(self.device)
        gains = self._spread(len(chosen), 3) * ranges
        index, place = kept.nonzero(as_tuple=True)
        return {
            "img": self._paint(self.images, self.sizes, warp, inverse(warp.matrix), gains, self.imgsz),
            "cls": self.classes[warp.images].flatten(1)[index, place][:, None],
            "bboxes": boxes[index, place],
            "batch_idx": index.float(),
        }

    def _draw(self, chosen: Tensor) -> Warp:
        """Draw what the inputs of a batch are made of: mosaics, or single images in the middle of the plane."""
        side, count = self.imgsz, len(chosen)
        others = torch.randint(len(self.images), (count, 3), generator=self.generator, device=self.device)
        images = torch.cat([chosen[:, None], others], 1)
        sizes = self.sizes[images]
        seam = torch.floor((1 + 0.5 * self._spread(count, 2)) * side)
        corners = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).to(self.device)
        shift = seam[:, None] - corners * sizes  # each image has a corner at the seam
        alone = self._uniform(count) >= self.mosaic
        seam = torch.where(alone[:, None], 2.0 * side, seam)
        shift = torch.where(alone[:, None, None], 2.0 * side, shift)
        middle = torch.floor(side - sizes[:, 0] / 2)
        shift[:, 0] = torch.where(alone[:, None], middle, shift[:, 0])
        return Warp(images, shift, seam, *self._draw_matrices(count))

    def _draw_matrices(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw rotation, scale, shear and translation about the middle of the plane, and flips."""
        options, side = self.options, self.imgsz
        one = isinstance(options.scale, (int, float))
        least, most = (1 - options.scale, 1 + options.scale) if one else options.scale
        scale = least + (most - least) * self._uniform(count)
        angle = torch.deg2rad(self._spread(count) * options.degrees)
        cosine, sine = scale * angle.cos(), scale * angle.sin()
        turn = torch.stack([cosine, sine, -sine, cosine], -1).view(-1, 2, 2)
        lean = torch.deg2rad(self._spread(count, 2) * options.shear).tan()
        shear = torch.eye(2, device=self.device) + torch.diag_embed(lean).flip(-1)
        flips = self._uniform(count, 2) < torch.tensor([options.fliplr, options.flipud]).to(self.device)
        sign = torch.where(flips, -1.0, 1.0)
        linear = sign[..., None] * (shear @ turn)
        target = sign * self._spread(count, 2) * options.translate * side + side / 2
        return torch.cat([linear, (target - side * linear.sum(-1))[..., None]], -1), scale

    def _spread(self, *shape: int) -> Tensor:
        return 2 * self._uniform(*shape) - 1

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device)


class _Shuffled:
    """The order of an epoch, or a process' share of it."""

    def __init__(self, count: int, seed: int, rank: int, world: int) -> None:
        self.count, self.seed, self.rank, self.world = count, seed, rank, world

    def __len__(self) -> int:
        return math.ceil(self.count / self.world)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the loader is told."""

    def order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 7919 * epoch)
        order = torch.randperm(self.count, generator=generator)
        order = torch.cat([order, order[: len(self) * self.world - self.count]])
        return order[self.rank :: self.world]


def refuse_unsupported(options: dict[str, Any]) -> None:
    """Refuse augmentations that :class:`DeviceLoader` does not do.

    Raises:
        ConfigError: names the option.
    """
    asked = [name for name in UNSUPPORTED if options.get(name)]
    if options.get("augmentations"):
        asked.append("augment")
    if asked:
        raise ConfigError(f"loader: device does no {', '.join(asked)}; set them to 0, or take loader: workers")


def paint(images: Tensor, sizes: Tensor, warp: Warp, back: Tensor, gains: Tensor, side: int) -> Tensor:
    """Return network inputs, (B, 3, side, side) uint8; arguments are those of :func:`warped`, :func:`recoloured`."""
    return recoloured(warped(images, sizes, warp, back, side), gains)


def inverse(matrix: Tensor) -> Tensor:
    """Invert affine maps (B, 2, 3)."""
    (a, b, x), (c, d, y) = matrix.permute(1, 2, 0)
    rows = torch.stack([d, -b, b * y - d * x, -c, a, c * x - a * y], -1) / (a * d - b * c)[:, None]
    return rows.view(-1, 2, 3)


def warped(images: Tensor, sizes: Tensor, warp: Warp, back: Tensor, side: int) -> Tensor:
    """Cut network inputs out, by bilinear interpolation.

    Args:
        images: (N, S, S, 3) uint8, each in its upper left corner.
        sizes: (N, 2) width and height of each.
        warp: how.
        back: inverse of its matrix.
        side: of an input.

    Returns:
        (B, 3, side, side) float32 in 0..255.
    """
    steps = torch.arange(side, device=images.device) + 0.5
    back = back[..., None, None]  # (B, 2, 3, 1, 1)
    plane = back[:, :, 0] * steps + back[:, :, 1] * steps[:, None] + back[:, :, 2]  # (B, 2, side, side)
    beyond = (plane >= warp.seam[..., None, None]).long()
    tile = (beyond[:, 0] + 2 * beyond[:, 1]).flatten(1)
    image = warp.images.gather(1, tile).view(-1, side, side)
    shift = warp.shift.gather(1, tile[..., None].expand(-1, -1, 2)).view(-1, side, side, 2).permute(0, 3, 1, 2)
    at, size = plane - shift - 0.5, sizes[image].permute(0, 3, 1, 2)
    inside = ((at > -0.5) & (at < size - 0.5) & (plane > 0) & (plane < 2 * side)).all(1, keepdim=True)
    low = at.floor()
    x, y = torch.split(at - low, 1, 1)
    _, height, width, _ = images.shape
    flat = images.view(-1, 3)

    def pixels(right: int, down: int) -> Tensor:
        column = (low[:, 0] + right).clamp(min=0).minimum(size[:, 0] - 1).long()
        row = (low[:, 1] + down).clamp(min=0).minimum(size[:, 1] - 1).long()
        return flat[(image * height + row) * width + column].permute(0, 3, 1, 2).float()

    above = torch.lerp(pixels(0, 0), pixels(1, 0), x)
    return torch.where(inside, torch.lerp(above, torch.lerp(pixels(0, 1), pixels(1, 1), x), y), float(PAD))


def warped_boxes(boxes: Tensor, warp: Warp, side: int) -> tuple[Tensor, Tensor]:
    """Move boxes along with their images.

    Args:
        boxes: (B, 4, M, 4), corners in pixels of the image; empty ones are padding.
        warp: how.
        side: of an input.

    Returns:
        (B, 4 M, 4) centres, widths and heights in shares of an input, and (B, 4 M) which boxes are kept.
    """
    boxes = (boxes + warp.shift.repeat(1, 1, 2)[:, :, None]).clamp(0, 2 * side).flatten(1, 2)
    corners = boxes[..., [0, 1, 2, 3, 0, 3, 2, 1]].view(len(boxes), -1, 4, 2)
    moved = corners @ warp.matrix[:, None, :, :2].transpose(2, 3) + warp.matrix[:, None, None, :, 2]
    low, high = moved.amin(-2).clamp(0, side), moved.amax(-2).clamp(0, side)
    extent = high - low
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1) * warp.scale[:, None] ** 2
    ratio = extent.amax(-1) / extent.amin(-1).clamp(min=1e-9)
    kept = (extent.amin(-1) > LEAST_SIDE) & (extent.prod(-1) > LEAST_AREA * area) & (ratio < LARGEST_RATIO)
    return torch.cat([(low + high) / 2, extent], -1) / side, kept & (area > 0)


def recoloured(pixels: Tensor, gains: Tensor) -> Tensor:
    """Change hue, saturation and value, as shares of their range.

    Args:
        pixels: (B, 3, H, W) RGB in 0..255.
        gains: (B, 3): hue is shifted by so many turns, saturation and value are scaled by 1 + the others.

    Returns:
        Likewise, rounded, as uint8.
    """
    value, lowest = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    chroma = (value - lowest).clamp(min=1e-6)
    red, green, blue = torch.split(pixels, 1, 1)
    hue = torch.where(
        value == red,
        (green - blue) / chroma,
        torch.where(value == green, 2 + (blue - red) / chroma, 4 + (red - green) / chroma),
    )
    hue_gain, saturation_gain, value_gain = gains[:, :, None, None, None].unbind(1)
    saturation = ((value - lowest) / value.clamp(min=1e-6) * (1 + saturation_gain)).clamp(0, 1)
    value = (value * (1 + value_gain)).clamp(0, 255)
    sector = torch.tensor([5.0, 3.0, 1.0], device=pixels.device)[:, None, None] + hue + 6 * hue_gain
    sector = sector.remainder(6)
    weight = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return (value * (1 - saturation * weight)).round().to(torch.uint8)


def _load_images(dataset: Any, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Read images as Ultralytics does, longest side at ``side`` pixels: (N, side, side, 3) RGB, and (N, 2) sizes."""
    need = len(dataset) * side * side * 3
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else need
    if need > room:
        raise ConfigError(
            f"loader: device would hold {len(dataset)} images in {need / 1e9:.1f} GB of {device}, and half of what is "
            f"free is {room / 1e9:.1f}; take loader: workers"
        )
    images = torch.full((len(dataset), side, side, 3), PAD, dtype=torch.uint8)
    sizes = torch.zeros(len(dataset), 2)
    with ThreadPool(NUM_THREADS) as pool:
        for index, (pixels, _, (height, width)) in enumerate(pool.imap(dataset.load_image, range(len(dataset)))):
            images[index, :height, :width] = torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1]))
            sizes[index] = torch.tensor([width, height])
    return images.to(device), sizes.to(device)


def _load_boxes(dataset: Any, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return corners in pixels (N, M, 4) and classes (N, M); an image with fewer boxes is filled up with empty ones."""
    most = max((len(label["cls"]) for label in dataset.labels), default=0)
    boxes, classes = torch.zeros(len(dataset), max(most, 1), 4), torch.zeros(len(dataset), max(most, 1))
    for index, label in enumerate(dataset.labels):
        found = torch.as_tensor(label["bboxes"]).float()
        boxes[index, : len(found)] = torch.cat([found[:, :2] - found[:, 2:] / 2, found[:, :2] + found[:, 2:] / 2], 1)
        classes[index, : len(found)] = torch.as_tensor(label["cls"]).float().flatten()
    return boxes.to(sizes.device) * sizes.repeat(1, 2)[:, None], classes.to(sizes.device)
