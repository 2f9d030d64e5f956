"""Images that are smaller than what a model sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fill_to(image: Tensor, size: tuple[int, int], fill: Sequence[float] | Tensor) -> Tensor:
    """The image (..., 3, h, w) with the colour `fill` below and to the right, at least `size`."""
    height, width = image.shape[-2:]
    tall, wide = max(height, size[0]), max(width, size[1])
    if (tall, wide) == (height, width):
        return image
    colour = torch.as_tensor(fill, dtype=image.dtype, device=image.device).view(3, 1, 1)
    filled = colour.expand(*image.shape[:-2], tall, wide).clone()
    filled[..., :height, :width] = image
    return filled
