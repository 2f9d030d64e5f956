"""A segmenter over a whole image: by sliding window, at several sizes, mirrored.

K classes, h w the size at which the model sees the image, H W the labels' own size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featdistill.models.padding import fill_to

Logits = Callable[[Tensor], Tensor]  # images (B, 3, h, w) -> logits (B, K, h, w)
_CHUNK = 16  # classes brought to the labels' size at once


@dataclass(frozen=True)
class Sliding:
    """Windows over an image.

    Attributes:
        window: (height, width) in pixels.
        stride: (vertical, horizontal) in pixels; the last window ends at the image's edge.
        fill: (r, g, b) in 0..1 around an image smaller than the window.
        batch: windows that pass the model together.
    """

    window: tuple[int, int]
    stride: tuple[int, int]
    fill: tuple[float, float, float] = (0.0, 0.0, 0.0)
    batch: int = 8


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin on one axis: every `stride`, and the last one at the end."""
    if length <= window:
        return [0]
    count = -(-(length - window) // stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


def sliding_logits(logits: Logits, image: Tensor, sliding: Sliding) -> Tensor:
    """Mean logits of all windows that see a pixel.

    Args:
        image: (3, h, w) float in [0, 1].

    Returns:
        (K, h, w) float32.
    """
    height, width = image.shape[-2:]
    tall, wide = sliding.window
    image = fill_to(image, sliding.window, sliding.fill)
    rows, columns = image.shape[-2:]
    corners = [
        (top, left)
        for top in starts(rows, tall, sliding.stride[0])
        for left in starts(columns, wide, sliding.stride[1])
    ]
    total, seen = None, torch.zeros(rows, columns, device=image.device)
    for first in range(0, len(corners), sliding.batch):
        some = corners[first : first + sliding.batch]
        windows = torch.stack([image[:, t : t + tall, s : s + wide] for t, s in some])
        for (top, left), found in zip(some, logits(windows).float(), strict=True):
            if total is None:
                total = image.new_zeros(len(found), rows, columns, dtype=torch.float32)
            total[:, top : top + tall, left : left + wide] += found
            seen[top : top + tall, left : left + wide] += 1
    assert total is not None
    return (total / seen)[:, :height, :width]


@dataclass(frozen=True)
class Looks:
    """How an image is looked at.

    Attributes:
        sliding: windows; None: the whole image at once.
        scales: sizes, as multiples of the image's.
        flip: its mirror image too.
    """

    sliding: Sliding | None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False


@torch.no_grad()
def predict_mask(logits: Logits, image: Tensor, size: tuple[int, int], looks: Looks) -> Tensor:
    """The most likely class of each pixel.

    One look: logits are brought to the labels' size and the largest wins, as in mmsegmentation.
    Several looks: the mean of their probabilities at the image's size decides, brought to the
    labels' size afterwards (mmsegmentation: before, with K full-size maps in memory for each).

    Args:
        image: (3, h, w) float in [0, 1], as the model shall see it at scale 1.
        size: (H, W) of the result.

    Returns:
        (H, W) int64.
    """
    each = [(scale, mirrored) for scale in looks.scales for mirrored in _mirrors(looks.flip)]
    if each == [(1.0, False)]:
        return largest(_look(logits, image, looks.sliding), size)
    total = None
    for scale, mirrored in each:
        found = _look(logits, _scaled(image, scale, mirrored), looks.sliding)
        if mirrored:
            found = found.flip(-1)
        chance = _bilinear(found, image.shape[-2:]).softmax(0)
        total = chance if total is None else total + chance
    assert total is not None
    return largest(total, size)


def _mirrors(flip: bool) -> tuple[bool, ...]:
    return (False, True) if flip else (False,)


def _look(logits: Logits, image: Tensor, sliding: Sliding | None) -> Tensor:
    return (
        logits(image[None])[0].float()
        if sliding is None
        else sliding_logits(logits, image, sliding)
    )


def _scaled(image: Tensor, scale: float, mirrored: bool) -> Tensor:
    if scale != 1:
        size = [max(1, round(side * scale)) for side in image.shape[-2:]]
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return image.flip(-1) if mirrored else image


def _bilinear(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], tuple(size), mode="bilinear", align_corners=False)[0]


def largest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """argmax over classes of maps (K, h, w) brought to (H, W), a few classes at a time."""
    best = maps.new_full(size, float("-inf"))
    chosen = torch.zeros(size, dtype=torch.long, device=maps.device)
    for first in range(0, len(maps), _CHUNK):
        value, which = _bilinear(maps[first : first + _CHUNK], size).max(0)
        better = value > best
        best = torch.where(better, value, best)
        chosen = torch.where(better, which + first, chosen)
    return chosen
