"""A batch's random crops at once, to the bit what `views` makes of each image by itself.

Torchvision resizes uint8 images in fixed point: weights of at most 15 bits, whole sums of products,
rounded between the two directions. Sums of whole numbers below 2^24 are exact in float32, whatever
their order and the device, so that two batched matrix products give the very same views.

B batch, S side of a view, H W sides of the largest image, K taps of a view's pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from featdistill.core.seeds import generator, keys, streams
from featdistill.data.joint_views import JointView
from featdistill.data.views import CropView, FinetuneView, View, random_box

_EXACT = 1 << 24  # whole numbers that float32 can hold
# bytes of the largest intermediate result: a core's cache, or much work for each launch
_TEMPORARY = {"cpu": 1 << 20, "cuda": 1 << 27}
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Boxes:
    """Crops in pixels and whether they are mirrored, (B,) each."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray


@dataclass(frozen=True)
class BatchedCrop:
    """How a view that is a random crop and mirroring is drawn.

    Attributes:
        name: of its draws.
        bicubic: instead of bilinear.
    """

    name: Literal["crop", "finetune"]
    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    bicubic: bool

    def boxes(
        self, seed: int, epoch: int, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> Boxes:
        """The boxes that the view draws at the addresses (seed, epoch, index).

        Two attempts at a box of the right shape are drawn side by side; the few images that need
        more are drawn one by one.
        """
        draws = _Draws(keys(self.name, seed, epoch, last=indices.tolist()), heights, widths)
        for _ in range(2):
            draws.attempt(self.scale, self.ratio)
        boxes = draws.boxes
        for row in np.flatnonzero(~draws.done):
            rng = generator(self.name, seed, epoch, int(indices[row]))
            box = random_box(rng, int(heights[row]), int(widths[row]), self.scale, self.ratio)
            boxes.top[row], boxes.left[row] = box.top, box.left
            boxes.height[row], boxes.width[row] = box.height, box.width
            boxes.flip[row] = rng.random() < 0.5
        return boxes if self.flip else Boxes(*_sides(boxes), np.zeros_like(boxes.flip))


def batched(view: View | JointView) -> BatchedCrop | None:
    """A view in the form that can be drawn by the batch; None if it is more than a crop."""
    if isinstance(view, CropView):
        return BatchedCrop("crop", view.size, view.scale, view.ratio, view.flip, bicubic=False)
    if isinstance(view, FinetuneView) and view.augment is None:
        return BatchedCrop("finetune", view.size, view.scale, view.ratio, view.flip, bicubic=True)
    return None


class _Draws:
    """`views.random_box` and the mirroring after it, for many streams side by side."""

    def __init__(self, many: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> None:
        count = len(many)
        self.words = streams(many, 2)
        self.used = 0
        self.heights, self.widths = heights, widths
        self.done = np.zeros(count, bool)
        top, left, height, width = np.zeros((4, count), np.int64)
        self.boxes = Boxes(top, left, height, width, np.zeros(count, bool))

    def attempt(self, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
        """One more try at a box that lies within its image."""
        first, second, third, fourth = (self.words[:, self.used + k] for k in range(4))
        self.used += 2
        target = self.heights * self.widths * _between(first, *scale)
        low, high = math.log(ratio[0]), math.log(ratio[1])
        # math's, since NumPy's exponential may differ in the last bit
        aspect = np.array([math.exp(x) for x in _between(second, low, high).tolist()])
        width = np.rint(np.sqrt(target * aspect)).astype(np.int64)
        height = np.rint(np.sqrt(target / aspect)).astype(np.int64)
        fits = (width > 0) & (width <= self.widths) & (height > 0) & (height <= self.heights)
        down, right = self.heights - height + 1, self.widths - width + 1
        # a place that there is no choice of takes no number; two share one, half and half
        top, sure = _below(third & _LOW, down)
        left, certain = _below(np.where(down > 1, third >> np.uint64(32), third & _LOW), right)
        flip = _unit(np.where((down > 1) | (right > 1), fourth, third)) < 0.5
        now = fits & sure & certain & ~self.done
        found = (top, left, height, width, flip)
        boxes = self.boxes
        for kept, new in zip((*_sides(boxes), boxes.flip), found, strict=True):
            kept[now] = new[now]
        self.done |= now


def _sides(boxes: Boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return boxes.top, boxes.left, boxes.height, boxes.width


def _unit(words: np.ndarray) -> np.ndarray:
    """`Generator.random` of these numbers."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _between(words: np.ndarray, low: float, high: float) -> np.ndarray:
    """`Generator.uniform` of these numbers."""
    return low + (high - low) * _unit(words)


def _below(words: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`Generator.integers` of these 32-bit numbers (Lemire 2019), and where it needs no other."""
    wide = np.maximum(limits, 1).astype(np.uint64)
    product = words * wide
    sure = (limits <= 1) | ((product & _LOW) >= wide)
    return np.where(limits > 1, product >> np.uint64(32), 0).astype(np.int64), sure


class Cutter:
    """Cuts boxes out of resident images and brings them to a view's size.

    Args:
        crop: what to make.
        height, width: sides of the largest image.
        device: where the images are.
    """

    def __init__(self, crop: BatchedCrop, *, height: int, width: int, device: torch.device) -> None:
        self.size, self.height, self.width = crop.size, height, width
        longest = max(height, width)
        tables = [_taps(n, crop.size, bicubic=crop.bicubic) for n in range(1, longest + 1)]
        most = max(weights.shape[1] for _, weights, _ in tables)
        starts = np.zeros((longest + 1, crop.size), np.int64)
        values = np.zeros((longest + 1, crop.size, most))
        largest = 0
        for n, (first, weights, bits) in enumerate(tables, 1):
            starts[n] = first
            values[n, :, : weights.shape[1]] = weights * 0.5**bits
            sums = np.abs(weights).sum(axis=1).max()
            largest = max(largest, 255 * int(sums) + (1 << bits >> 1))
        # TF32 and its like round the weights
        plain = torch.get_float32_matmul_precision() == "highest"
        self.dtype = torch.float32 if largest < _EXACT and plain else torch.float64
        self._starts = torch.from_numpy(starts).to(device)
        self._values = torch.from_numpy(values).to(device, self.dtype)
        self._taps = torch.arange(most, device=device)

    def __call__(self, pixels: Tensor, rows: np.ndarray, boxes: Boxes) -> Tensor:
        """Views of images.

        Args:
            pixels: (n, H, 3, W) uint8; smaller images in the upper left corner.
            rows: (B,) of `pixels`.

        Returns:
            (B, 3, S, S) uint8.
        """
        numbers = np.stack([rows, *_sides(boxes), boxes.flip.astype(np.int64)])
        told = torch.from_numpy(numbers)
        if pixels.device.type == "cuda":
            told = told.pin_memory().to(pixels.device, non_blocking=True)
        largest = 3 * self.size * max(self.height, self.size) * self.dtype.itemsize
        parts = told.split(max(1, _TEMPORARY[pixels.device.type] // largest), dim=1)
        with torch.autocast(pixels.device.type, enabled=False):  # bf16 would round the weights
            return torch.cat([self._cut(pixels, part) for part in parts])

    def _cut(self, pixels: Tensor, told: Tensor) -> Tensor:
        rows, top, left, height, width, flip = told
        count = len(rows)
        across = self._matrix(width, left, self.width)
        across = torch.where(flip[:, None, None] > 0, across.flip(1), across)
        down = self._matrix(height, top, self.height)
        images = pixels[rows].to(self.dtype).view(count, self.height * 3, self.width)
        lines = _rounded(images @ across.mT).view(count, self.height, 3 * self.size)
        views = _rounded(down @ lines).to(torch.uint8)
        return views.view(count, self.size, 3, self.size).transpose(1, 2).contiguous()

    def _matrix(self, lengths: Tensor, offsets: Tensor, side: int) -> Tensor:
        """(B, S, side) weights of an image's lines or columns in a view's."""
        values = self._values[lengths]
        places = (self._starts[lengths] + offsets[:, None])[:, :, None] + self._taps
        # room behind for taps without weight, so that no two of them share a place
        matrix = values.new_zeros(len(lengths), self.size, side + len(self._taps))
        return matrix.scatter_(2, places, values)[:, :, :side]


def _rounded(x: Tensor) -> Tensor:
    """To levels, as a shift of fixed-point numbers rounds."""
    return x.add_(0.5).floor_().clamp_(0, 255)


def _taps(length: int, size: int, *, bicubic: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Torch's antialiased resize of uint8 images along one side (its `UpSampleKernel.cpp`).

    Returns:
        The first pixel of each of `size` sums, their whole-numbered weights (size, K), and how
        many of their bits are behind the point.
    """
    scale = length / size
    support = (2.0 if bicubic else 1.0) * max(scale, 1.0)
    centre = scale * (np.arange(size) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), length) - first
    most = math.ceil(support) * 2 + 1
    weights, total = np.zeros((size, most)), np.zeros(size)
    for k in range(most):  # one after the other, as they are summed there
        distance = (k + first - centre + 0.5) * (1 / max(scale, 1.0))
        weights[:, k] = np.where(k < count, _filter(np.abs(distance), bicubic=bicubic), 0.0)
        total += weights[:, k]
    weights /= total[:, None]
    bits, largest = 0, weights.max()
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    fixed = weights * (1 << bits)
    return first, np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int64), bits


def _filter(x: np.ndarray, *, bicubic: bool) -> np.ndarray:
    """The triangle, or Keys' cubic with a = -0.5, at distances x >= 0."""
    if not bicubic:
        return np.maximum(1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
