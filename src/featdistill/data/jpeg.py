"""Plain JPEG pictures, decoded as far down as they are needed.

Pillow decodes with the same library (libjpeg-turbo), so that the pixels are the same to the bit;
but it decodes whole pictures, into four bytes a pixel, and copies them twice. Whatever is unusual
is left to it: `frame_of` and `decode_rows` give None, and its word counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import simplejpeg

SHRINKS = (8, 4, 2)  # by which libjpeg-turbo decodes quickly; 7/8, 3/4, ... take longer than 1/1
_COLOURS = frozenset(("Gray", "RGB", "YCbCr"))
_CONTEXT = 8  # rows below that smooth colour looks at: one of its own, which is four at most

_SEQUENTIAL = frozenset((0xC0, 0xC1))
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF0 .. SOF15
_SCAN, _END = 0xDA, b"\xff\xd9"
# 0xff before a stuffed zero, before filling and in a restart marker belongs to the scan
_ANOTHER_SEGMENT = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


@dataclass(frozen=True)
class Frame:
    """What a JPEG file holds.

    Attributes:
        height, width: as stored, before any rotation.
        height_at: place in the file of the height's two bytes, where the picture's rows stand in
            it from top to bottom, and nothing after them could make it unreadable; or None.
    """

    height: int
    width: int
    height_at: int | None


def frame_of(data: bytes, height: int, width: int) -> Frame | None:
    """The frame of a file with such a picture; None if it is not plain, or of another size."""
    try:
        found = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # any warning; or an unknown subsampling
        return None
    if found[:2] != (height, width) or found[2] not in _COLOURS:
        return None
    return Frame(height, width, _height_at(data))


def _height_at(data: bytes) -> int | None:
    """See `Frame`: for one frame of one scan up to the end of the file's picture."""
    at, frame, last = 2, None, len(data) - 4
    while at < last and data[at] == 0xFF:
        kind, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if kind == _SCAN:
            end = _ANOTHER_SEGMENT.search(data, at + 2 + length)
            if frame is None or data[frame + 9] != data[at + 4] or end is None or end[0] != _END:
                return None  # several scans, or what Pillow might refuse
            return frame + 5
        if kind in _FRAMES:
            if kind not in _SEQUENTIAL or frame is not None or at + 9 > last:
                return None
            frame = at
        at += 2 + length
    return None


def decode_rows(data: bytes, frame: Frame, *, bottom: int, shrink: int = 1) -> np.ndarray | None:
    """A picture's rows down to `bottom`, or more of them.

    Args:
        bottom: the first row that is not needed, 1 .. height.
        shrink: 1, or one of SHRINKS: decode at a half, quarter, eighth of the size.

    Returns:
        (rows / shrink, width / shrink, 3) uint8 RGB, rounded up; None if it takes Pillow to tell
        what the file is worth.
    """
    rows, source = frame.height, data
    if frame.height_at is not None and bottom + _CONTEXT < frame.height:
        # a file that claims to end earlier: the decoder stops there, and skips the rest
        rows, at = bottom + _CONTEXT, frame.height_at
        source = b"".join((data[:at], rows.to_bytes(2, "big"), data[at + 2 :]))
    height, width = -(-rows // shrink), -(-frame.width // shrink)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            source,
            min_height=height if shrink > 1 else 0,
            min_width=width if shrink > 1 else 0,
            # of the skipped rest it would complain; of damage above, Pillow says nothing either
            strict=rows == frame.height,
        )
    except (ValueError, MemoryError):
        return None
    return pixels if pixels.shape == (height, width, 3) else None
