"""How an image and its mask are cut together. A joint view is a pure function of its address.

Images are (3, height, width) uint8, masks (height, width) int16 with UNLABELLED pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from featdistill.core.seeds import generator
from featdistill.data.masks import UNLABELLED
from featdistill.data.views import Address

Size = tuple[int, int]
Pair = tuple[Tensor, Tensor]
_LONGEST = 4.0  # the long side at most, over the short one: ADE20K's (2048, 512)
_TRIES = 10


class JointView(ABC):
    """A view of an image and its mask."""

    @abstractmethod
    def __call__(self, image: Tensor, mask: Tensor, address: Address, /) -> Pair: ...


def fitted(height: int, width: int, short: float) -> Size:
    """An image's size when its short side becomes `short`, or its long side four times that."""
    scale = min(short / min(height, width), _LONGEST * short / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_pair(image: Tensor, mask: Tensor, size: Size) -> Pair:
    """Both at another size: the image smoothly, the mask by its nearest pixels."""
    # torchvision resizes a Mask by the older NEAREST, half a pixel beside the smooth image; as a
    # picture of one channel it takes the pixel whose centre is nearest
    exact = InterpolationMode.NEAREST_EXACT
    mask = F.resize_image(mask[None], list(size), exact)[0]
    return shown(image, size), mask


@dataclass(frozen=True)
class TrainingCrop(JointView):
    """Random scale, crop, mirroring and colours (mmsegmentation's pipeline for ADE20K).

    Attributes:
        size: (height, width) of the crop; what is missing is filled and unlabelled.
        short: the image's short side at scale 1.
        scale: the random scale's limits.
        largest: a crop is drawn again, ten times at most, while one class fills more than this
            share of its labelled pixels.
        flip: mirror half of the pairs.
        colour: brightness, contrast, saturation and hue change, each with this probability.
        fill: (r, g, b), 0..255, where the crop is larger than the image.
    """

    size: Size
    short: int
    scale: tuple[float, float] = (0.5, 2.0)
    largest: float = 0.75
    flip: bool = True
    colour: float = 0.5
    fill: tuple[int, int, int] = (124, 116, 104)

    def __call__(self, image: Tensor, mask: Tensor, address: Address) -> Pair:
        rng = generator("segmentation", *address)
        short = self.short * rng.uniform(*self.scale)
        image, mask = resize_pair(image, mask, fitted(mask.shape[0], mask.shape[1], short))
        image, mask = self._crop(image, mask, rng)
        if self.flip and rng.random() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return self._filled(distort(image, rng, self.colour), mask)

    def _crop(self, image: Tensor, mask: Tensor, rng: np.random.Generator) -> Pair:
        height, width = mask.shape
        tall, wide = min(self.size[0], height), min(self.size[1], width)
        for _ in range(_TRIES):
            top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
            part = F.crop(tv_tensors.Mask(mask), top, left, tall, wide).as_subclass(Tensor)
            labelled = part[part != UNLABELLED].long()
            if len(labelled) and int(labelled.bincount().max()) < self.largest * len(labelled):
                break
        return F.crop(tv_tensors.Image(image), top, left, tall, wide).as_subclass(Tensor), part

    def _filled(self, image: Tensor, mask: Tensor) -> Pair:
        """Colour and unlabelled pixels below and to the right, up to the crop's size."""
        below, right = self.size[0] - mask.shape[0], self.size[1] - mask.shape[1]
        if not below and not right:
            return image.contiguous(), mask.contiguous()
        edges = [0, 0, right, below]
        image = F.pad(tv_tensors.Image(image), edges, fill=list(self.fill)).as_subclass(Tensor)
        mask = F.pad(tv_tensors.Mask(mask), edges, fill=UNLABELLED).as_subclass(Tensor)
        return image, mask


def distort(image: Tensor, rng: np.random.Generator, probability: float) -> Tensor:
    """Photometric distortion (SSD's, as mmsegmentation has it; Liu et al. 2016).

    Brightness +-32 of 255, contrast and saturation x 0.5 .. 1.5, hue +-0.1 turns, each with a
    probability; contrast before or after the colours, at random.
    """
    if not probability:
        return image
    on = rng.random(4) < probability
    brightness, contrast = rng.uniform(-32, 32), rng.uniform(0.5, 1.5)
    saturation, hue = rng.uniform(0.5, 1.5), rng.uniform(-0.1, 0.1)
    early = bool(rng.random() < 0.5)
    if on[0]:
        image = _bytes(image.float() + brightness)
    if on[1] and early:
        image = _bytes(image.float() * contrast)
    if on[2]:
        image = F.adjust_saturation(image, saturation)
    if on[3]:
        image = F.adjust_hue(image, hue)
    if on[1] and not early:
        image = _bytes(image.float() * contrast)
    return image


def _bytes(image: Tensor) -> Tensor:
    return image.round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class ScoringView(JointView):
    """The image at a short side, its aspect kept; the mask as it is."""

    short: int

    def __call__(self, image: Tensor, mask: Tensor, _: Address) -> Pair:
        size = fitted(image.shape[1], image.shape[2], self.short)
        return shown(image, size), mask


def shown(image: Tensor, size: Size) -> Tensor:
    """An image (3, height, width) uint8 at another size."""
    bilinear = InterpolationMode.BILINEAR
    resized = F.resize(tv_tensors.Image(image), list(size), bilinear, antialias=True)
    return resized.as_subclass(Tensor)
