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
_CONTEXT = 8  # rows below that smooth colour looks at: one of its own, which is four at most

# ITU T.81, table B.1
_BASELINE, _EXTENDED, _PROGRESSIVE, _SCAN = 0xC0, 0xC1, 0xC2, 0xDA
_HUFFMAN, _QUANTIZATION, _RESTARTS, _COMMENT = 0xC4, 0xDB, 0xDD, 0xFE
_JFIF, _COLOUR_PROFILE, _ADOBE = 0xE0, 0xE2, 0xEE
_APPLICATION = range(0xE0, 0xF0)
_TABLES = frozenset((_HUFFMAN, _QUANTIZATION, _RESTARTS, _COMMENT, *_APPLICATION))
# segments of which Pillow wants no more than so many bytes (and EXIF's rotation is in none)
_FAMILIAR = {
    **dict.fromkeys((_HUFFMAN, _QUANTIZATION, _RESTARTS, _COMMENT), 2),
    _JFIF: 16,
    _COLOUR_PROFILE: 16,
    _ADOBE: 14,
}
_SEVERAL_PICTURES = b"MPF\0"
# what ends a scan: 0xff before a stuffed zero, before filling or in a restart marker belongs to it
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_END_OF_PICTURE = b"\xff\xd9"
_SKIPPED = re.compile(r"extraneous bytes before marker 0xd[0-79]")


@dataclass(frozen=True)
class Frame:
    """What a JPEG file holds.

    Attributes:
        height, width: as stored, before any rotation.
        grey: of one colour.
        height_at: place of the height's two bytes.
        scan: where the coded picture begins, if its rows stand there from top to bottom; or None.
        familiar: the file has no segment that Pillow would have to be asked about.
    """

    height: int
    width: int
    grey: bool
    height_at: int
    scan: int | None
    familiar: bool


def frame_of(data: bytes) -> Frame | None:
    """A file's frame; None if it is no JPEG file, or an unusual one."""
    at, last, start, familiar = 2, len(data) - 4, 0, True
    if data[:2] != b"\xff\xd8":
        return None
    while at < last and data[at] == 0xFF:
        kind, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        after = at + 2 + length
        if kind == _SCAN:
            return _framed(data, start, at, familiar) if start and after < len(data) else None
        if kind in (_BASELINE, _EXTENDED, _PROGRESSIVE):
            if start or after > last or length != 8 + 3 * data[at + 9] or data[at + 4] != 8:
                return None
            start = at
        elif kind not in _TABLES:
            return None
        elif length < _FAMILIAR.get(kind, 1 << 16) or data[at + 4 : at + 8] == _SEVERAL_PICTURES:
            familiar = False
        at = after
    return None


def _framed(data: bytes, start: int, scan: int, familiar: bool) -> Frame | None:
    """The frame whose segment starts at one place, and the segment of its scan at another."""
    height, width = (int.from_bytes(data[start + i : start + i + 2], "big") for i in (5, 7))
    colours = data[start + 9]
    if colours not in (1, 3) or not height or not width:
        return None
    whole = data[start + 1] != _PROGRESSIVE and data[scan + 4] == colours
    coded = scan + 2 + (data[scan + 2] << 8 | data[scan + 3])
    return Frame(height, width, colours == 1, start + 5, coded if whole else None, familiar)


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
    if bottom + _CONTEXT < rows and _is_complete(data, frame):
        # a file that claims to end earlier: the decoder stops there, and skips the rest
        rows, at = bottom + _CONTEXT, frame.height_at
        source = b"".join((data[:at], rows.to_bytes(2, "big"), data[at + 2 :]))
    pixels = np.empty((-(-rows // shrink), -(-frame.width // shrink), 3), np.uint8)
    height, width = pixels.shape[:2] if shrink > 1 else (0, 0)
    try:
        found = simplejpeg.decode_jpeg(
            source, min_height=height, min_width=width, buffer=pixels, strict=True
        )
    except ValueError as error:
        # the last that was complained of: if it is the skipped rest, all before has been decoded
        skipped = rows < frame.height and _SKIPPED.search(str(error))
        return pixels if skipped else None
    return pixels if found.shape == pixels.shape else None


def _is_complete(data: bytes, frame: Frame) -> bool:
    """Whether Pillow would decode all of it, whatever stands in the rows that are left out."""
    if frame.scan is None:
        return False
    end = _END_OF_SCAN.search(data, frame.scan)
    return end is not None and end[0] == _END_OF_PICTURE
