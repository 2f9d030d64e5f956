"""How an image becomes what the models see. A view is a pure function of image and address.

An address is (seed, epoch, index). Images are (3, height, width) uint8, or Pictures of that shape;
views are square, (3, size, size) uint8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from featdistill.core.errors import DataError
from featdistill.core.seeds import generator, seeded_globals
from featdistill.data.decode import Box, Picture, from_pil

Address = tuple[int, int, int]


class View(Protocol):
    """One or several views of an image."""

    def __call__(self, image: Tensor | Picture, address: Address, /) -> tuple[Tensor, ...]: ...


def random_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Inception's random crop as torchvision draws it: area uniform, aspect log-uniform.

    After ten misses the largest central crop within the aspect limits is taken.
    """
    area = height * width
    for _ in range(10):
        target = area * _uniform(rng, *scale)
        aspect = math.exp(_uniform(rng, math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    aspect = width / height
    w, h = width, height
    if aspect < ratio[0]:
        h = max(1, round(w / ratio[0]))
    elif aspect > ratio[1]:
        w = max(1, round(h * ratio[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """`rng.uniform`, several times faster for one number."""
    return low + (high - low) * rng.random()


def crop(image: Tensor | Picture, box: Box, size: int, *, bicubic: bool = False) -> Tensor:
    """Cut `box` out and bring it to (3, size, size), antialiased."""
    if isinstance(image, Picture):
        if (part := image.smaller(box, size)) is not None:
            return part.resized(size, bicubic=bicubic)
        cut = image.cut(box)
    else:
        cut = box.of(image)
    # a pixel's colours side by side, as they were decoded: so torch resizes fastest, but rows with
    # gaps between them it would tear apart into planes first
    rows = cut.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    mode = "bicubic" if bicubic else "bilinear"
    return interpolate(rows[None], (size, size), mode=mode, antialias=True)[0]


@dataclass(frozen=True)
class CropView:
    """The paper's view: random resized crop and mirroring, nothing else."""

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __call__(self, image: Tensor | Picture, address: Address) -> tuple[Tensor, ...]:
        rng = generator("crop", *address)
        box = random_box(rng, image.shape[1], image.shape[2], self.scale, self.ratio)
        view = crop(image, box, self.size)
        if self.flip and rng.random() < 0.5:
            view = view.flip(-1)
        return (view,)


@dataclass(frozen=True)
class EvalView:
    """The central crop: shorter side to size / share, then (size, size) from the middle."""

    size: int
    share: float = 0.875

    def __call__(
        self, image: Tensor | Picture, _address: Address | None = None
    ) -> tuple[Tensor, ...]:
        side = min(image.shape[1], image.shape[2]) * self.share
        cut = max(1, round(side))
        box = Box((image.shape[1] - cut) // 2, (image.shape[2] - cut) // 2, cut, cut)
        return (crop(image, box, self.size, bicubic=True),)


class FinetuneView:
    """Supervised training's view: random crop, mirroring, RandAugment.

    Args:
        randaugment: timm's specification (`rand-m9-mstd0.5-inc1`), or None.
        mean: RGB in [0, 1], the colour that fills what a rotation or shift uncovers.
    """

    def __init__(
        self,
        *,
        size: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: bool,
        randaugment: str | None,
        mean: tuple[float, float, float],
    ) -> None:
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip
        self.augment = None if randaugment is None else _randaugment(randaugment, size, mean)

    def __call__(self, image: Tensor | Picture, address: Address) -> tuple[Tensor, ...]:
        rng = generator("finetune", *address)
        box = random_box(rng, image.shape[1], image.shape[2], self.scale, self.ratio)
        view = crop(image, box, self.size, bicubic=True)
        if self.flip and rng.random() < 0.5:
            view = view.flip(-1)
        if self.augment is not None:
            with seeded_globals("randaugment", *address):
                view = from_pil(self.augment(F.to_pil_image(view)))
        return (view,)


def _randaugment(spec: str, size: int, mean: tuple[float, float, float]) -> Any:
    from timm.data import auto_augment
    from timm.data.auto_augment import rand_augment_transform

    fill = tuple(min(255, round(255 * m)) for m in mean)
    hparams = {"translate_const": int(size * 0.45), "img_mean": fill}
    try:
        augment = rand_augment_transform(spec, hparams)
    except (AssertionError, ValueError, KeyError) as error:
        raise DataError(
            f"'{spec}' is no RandAugment specification ({error})",
            expected="timm's, such as rand-m9-mstd0.5-inc1, or none",
        ) from None
    for op in augment.ops:
        # strong magnitudes ask for 0 bits: a black image once, an error since Pillow 13
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


@dataclass(frozen=True)
class ContrastiveView:
    """SimCLR's two views: crop, mirroring, rotation, colour jitter, grey, blur (Chen et al. 2020).

    Attributes:
        brightness, contrast, saturation, hue: colour jitter, as torchvision's; on 80 % of views.
        rotate: largest rotation, degrees.
        gray, blur: probabilities.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    rotate: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    gray: float = 0.2
    blur: float = 0.0

    def __call__(self, image: Tensor | Picture, address: Address) -> tuple[Tensor, ...]:
        return tuple(self._one(image, generator("contrastive", side, *address)) for side in (0, 1))

    def _one(self, image: Tensor | Picture, rng: np.random.Generator) -> Tensor:
        box = random_box(rng, image.shape[1], image.shape[2], self.scale, self.ratio)
        view = crop(image, box, self.size)
        if self.flip and rng.random() < 0.5:
            view = view.flip(-1)
        if self.rotate:
            angle = rng.uniform(-self.rotate, self.rotate)
            view = F.rotate(view, angle, InterpolationMode.BILINEAR)
        if rng.random() < 0.8:
            view = self._recolour(view, rng)
        if rng.random() < self.gray:
            view = F.rgb_to_grayscale(view, num_output_channels=3)
        if rng.random() < self.blur:
            kernel = max(3, 2 * (self.size // 20) + 1)
            view = F.gaussian_blur(view, [kernel, kernel], [rng.uniform(0.1, 2.0)] * 2)
        return view

    def _recolour(self, view: Tensor, rng: np.random.Generator) -> Tensor:
        """Colour jitter, its parts in random order; parts of strength 0 cost nothing."""
        parts = (
            (F.adjust_brightness, self.brightness, 1.0),
            (F.adjust_contrast, self.contrast, 1.0),
            (F.adjust_saturation, self.saturation, 1.0),
            (F.adjust_hue, self.hue, 0.0),
        )
        for which in rng.permutation(len(parts)):
            change, reach, centre = parts[which]
            amount = rng.uniform(centre - reach, centre + reach)
            if reach:
                view = change(view, amount)
        return view
