"""Encoded bytes to pixels."""

from __future__ import annotations

import io
import os
import stat
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Pillow knows forty formats more, and some of them start programs (EPS: Ghostscript) or are read by
# old code; what a file is, its first bytes say, whatever its name.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB"),
    *("PPM", "TIFF", "JPEG2000", "AVIF", "QOI", "TGA", "ICO"),
)
_MOST_PIXELS = 1 << 27  # 134 megapixels; decoded 0.4 GB, and as much again while it is cropped
_PLAIN_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"))
_SIXTEEN_BIT = frozenset(("I;16", "I;16L", "I;16B", "I;16N"))


class BadImage(ValueError):
    """An image that cannot be decoded; the message says why."""


def read_file(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        BadImage: it cannot be read, or is a pipe, socket or device, which might never end.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadImage("not a file of data")
        return path.read_bytes()
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    except ValueError as error:  # a name with a NUL
        raise BadImage(str(error)) from None


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow has; AVIF is not in all."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """An image file's header; its pixels are decoded when they are asked for.

    Raises:
        BadImage: it would be larger than any photograph.
        OSError, ValueError, ...: no image, or damaged (Pillow's parsers raise what they will).
    """
    image = Image.open(file, formats=_formats())
    check_pixels(image)
    return image


def check_pixels(image: Image.Image) -> None:
    """Raise BadImage for an image that is too large to be decoded."""
    if image.width * image.height > _MOST_PIXELS:
        raise BadImage(
            f"{image.width} x {image.height} pixels are more than the {_MOST_PIXELS:,} allowed"
        )


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
        with open_image(io.BytesIO(data)) as image:
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
