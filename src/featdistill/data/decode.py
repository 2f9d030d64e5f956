"""Encoded bytes to pixels.

A plain JPEG picture is decoded by `jpeg`, and where it has to be cropped, no further down than the
crop reaches; every other file by Pillow, which also has the last word on what is damaged.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from featdistill.data.jpeg import SHRINKS, Frame, decode_rows, frame_of

# Pillow knows forty formats more, and some of them start programs (EPS: Ghostscript) or are read by
# old code; what a file is, its first bytes say, whatever its name.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB"),
    *("PPM", "TIFF", "JPEG2000", "AVIF", "QOI", "TGA", "ICO"),
)
MOST_PIXELS = 1 << 27  # 134 megapixels; decoded 0.4 GB, and as much again while it is cropped
_UNQUESTIONED = 1 << 24  # and a JPEG picture of up to 17 is decoded before Pillow has seen it
_PLAIN_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"))
_SIXTEEN_BIT = frozenset(("I;16", "I;16L", "I;16B", "I;16N"))


class BadImage(ValueError):
    """An image that cannot be decoded; the message says why."""


def read_file(path: Path | str) -> bytes:
    """A file's bytes.

    Raises:
        BadImage: it cannot be read, or is a pipe, socket or device, which might never end.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadImage("not a file of data")
        with open(path, "rb", buffering=0) as file:
            return file.readall()
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
    if image.width * image.height > MOST_PIXELS:
        raise BadImage(
            f"{image.width} x {image.height} pixels are more than the {MOST_PIXELS:,} allowed"
        )


@dataclass(frozen=True)
class Box:
    """A crop, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """The first row below."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """The first column to the right."""
        return self.left + self.width

    def of(self, image: Tensor) -> Tensor:
        """The crop's pixels, a view of (3, height, width)."""
        return image[:, self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True)
class Turn:
    """How an upright picture is made of a stored one: mirror the rows, the columns, then swap."""

    rows: bool = False
    columns: bool = False
    swap: bool = False

    def upright(self, stored: Tensor) -> Tensor:
        """(3, height, width) as it is to be seen."""
        mirrored = [axis for axis, on in ((1, self.rows), (2, self.columns)) if on]
        image = stored.flip(mirrored) if mirrored else stored
        return image.transpose(1, 2) if self.swap else image

    def stored(self, box: Box, height: int, width: int) -> Box:
        """Where an upright picture's box lies in the stored one of this size."""
        top, left, tall, wide = box.top, box.left, box.height, box.width
        if self.swap:
            top, left, tall, wide = left, top, wide, tall
        top = height - top - tall if self.rows else top
        left = width - left - wide if self.columns else left
        return Box(top, left, tall, wide)


@dataclass(frozen=True)
class Part:
    """A crop among the pixels that were decoded for it, between which its edges may lie.

    Attributes:
        pixels: (3, height, width) uint8.
        rows, columns: where it begins and ends.
    """

    pixels: Tensor
    rows: tuple[float, float]
    columns: tuple[float, float]

    def turned(self, turn: Turn) -> Part:
        """As it is to be seen."""
        _, height, width = self.pixels.shape
        rows = (height - self.rows[1], height - self.rows[0]) if turn.rows else self.rows
        columns = (
            (width - self.columns[1], width - self.columns[0]) if turn.columns else self.columns
        )
        pixels = turn.upright(self.pixels)
        return Part(pixels, columns, rows) if turn.swap else Part(pixels, rows, columns)

    def resized(self, size: int, *, bicubic: bool) -> Tensor:
        """(3, size, size) uint8, antialiased; by Pillow, which knows edges between pixels."""
        image = Image.fromarray(self.pixels.permute(1, 2, 0).contiguous().numpy())
        box = (self.columns[0], self.rows[0], self.columns[1], self.rows[1])
        way = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        return from_pil(image.resize((size, size), way, box)).contiguous()


# EXIF 2.32, tag 0x0112
_TURNS = {
    2: Turn(columns=True),
    3: Turn(rows=True, columns=True),
    4: Turn(rows=True),
    5: Turn(swap=True),
    6: Turn(rows=True, swap=True),
    7: Turn(rows=True, columns=True, swap=True),
    8: Turn(columns=True, swap=True),
}


@dataclass(frozen=True)
class Picture:
    """A plain JPEG picture that is decoded when it is known what of it is wanted.

    Attributes:
        scaled: a crop that becomes smaller anyway may be decoded at a half, a quarter or an eighth
            of the size, where that still has all pixels of the result.
    """

    data: bytes
    frame: Frame
    turn: Turn = Turn()
    scaled: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, height, width), upright, as that of an image."""
        size = self.frame.height, self.frame.width
        return (3, *(size[::-1] if self.turn.swap else size))

    def cut(self, box: Box) -> Tensor:
        """A crop's pixels, exactly.

        Returns:
            (3, height, width) uint8 of the box's size.

        Raises:
            BadImage: the file is damaged.
        """
        stored = self.turn.stored(box, self.frame.height, self.frame.width)
        pixels = decode_rows(self.data, self.frame, bottom=stored.bottom)
        if pixels is None:
            return box.of(_decode_with_pillow(self.data))
        return self.turn.upright(stored.of(torch.from_numpy(pixels).permute(2, 0, 1)))

    def smaller(self, box: Box, size: int) -> Part | None:
        """A crop that becomes (size, size), from fewer pixels; None if it has to be cut exactly."""
        shrink = next((s for s in SHRINKS if min(box.height, box.width) >= size * s), None)
        if shrink is None or not self.scaled:
            return None
        stored = self.turn.stored(box, self.frame.height, self.frame.width)
        found = decode_rows(self.data, self.frame, bottom=stored.bottom, shrink=shrink)
        if found is None:
            return None
        pixels = torch.from_numpy(found).permute(2, 0, 1)
        top, left = stored.top // shrink, stored.left // shrink
        bottom, right = -(-stored.bottom // shrink), -(-stored.right // shrink)
        part = Part(
            pixels[:, top:bottom, left:right],
            (stored.top / shrink - top, stored.bottom / shrink - top),
            (stored.left / shrink - left, stored.right / shrink - left),
        )
        return part.turned(self.turn)

    def pixels(self) -> Tensor:
        """All of it, exactly: (3, height, width) uint8. Raises BadImage."""
        pixels = decode_rows(self.data, self.frame, bottom=self.frame.height)
        if pixels is None:
            return _decode_with_pillow(self.data)
        return self.turn.upright(torch.from_numpy(pixels).permute(2, 0, 1))


def open_picture(data: bytes) -> Tensor | Picture:
    """An image file's picture, in RGB and upright: not yet decoded where it is a plain JPEG.

    Grey, palette and CMYK images become RGB; transparency is dropped; EXIF rotation is applied.

    Returns:
        (3, height, width) uint8, or a Picture of that shape.

    Raises:
        BadImage: not an image, damaged, or with more than three colour channels.
    """
    if not data:
        raise BadImage("empty file")
    frame = frame_of(data)
    if frame is not None and frame.familiar and frame.height * frame.width <= _UNQUESTIONED:
        return Picture(data, frame)
    with _pillows_words(), open_image(io.BytesIO(data)) as image:
        if frame is None or not _agree(frame, image):
            return from_pil(ImageOps.exif_transpose(image))
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return Picture(data, frame, _TURNS.get(orientation, Turn()))


def _agree(frame: Frame, image: Image.Image) -> bool:
    """Whether Pillow sees the same picture in the file's header."""
    return (
        image.format in ("JPEG", "MPO")
        and image.size == (frame.width, frame.height)
        and image.mode == ("L" if frame.grey else "RGB")
    )


def decode(data: bytes) -> Tensor:
    """An image file's pixels, (3, height, width) uint8; see `open_picture`."""
    found = open_picture(data)
    return found.pixels() if isinstance(found, Picture) else found


def _decode_with_pillow(data: bytes) -> Tensor:
    with _pillows_words(), open_image(io.BytesIO(data)) as image:
        return from_pil(ImageOps.exif_transpose(image))


@contextmanager
def _pillows_words() -> Iterator[None]:
    """Whatever Pillow raises is a BadImage: its plugins let their parsers' errors through."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(str(error).split(" <")[0] or type(error).__name__) from None


def from_pil(image: Image.Image) -> Tensor:
    """A PIL image of any colour mode as (3, height, width) uint8 RGB."""
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        pixels = np.clip(np.asarray(image).astype(np.int64) // 257, 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
    elif image.mode not in _PLAIN_MODES:
        raise BadImage(f"colour mode {image.mode} is not supported, expected grey or RGB")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
