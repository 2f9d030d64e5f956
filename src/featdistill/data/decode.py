"""Encoded bytes to pixels."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

_PLAIN_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"))
_SIXTEEN_BIT = frozenset(("I;16", "I;16L", "I;16B", "I;16N"))


class BadImage(ValueError):
    """An image that cannot be decoded; the message says why."""


def decode(data: bytes) -> Tensor:
    """Decode an image file's bytes to RGB, upright.

    Grey, palette and CMYK images become RGB; transparency is dropped; EXIF rotation is applied.

    Returns:
        (3, height, width) uint8.

    Raises:
        BadImage: not an image, damaged, or with more than three colour channels.
    """
    if not data:
        raise BadImage("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return from_pil(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except Exception as error:  # Pillow's plugins let their parsers' errors of any kind through
        raise BadImage(str(error).split(" <")[0] or type(error).__name__) from None


def from_pil(image: Image.Image) -> Tensor:
    """A PIL image of any colour mode as (3, height, width) uint8 RGB."""
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        pixels = np.clip(np.asarray(image).astype(np.int64) // 257, 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
    elif image.mode not in _PLAIN_MODES:
        raise BadImage(f"colour mode {image.mode} is not supported, expected grey or RGB")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
