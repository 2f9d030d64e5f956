"""Plain JPEG pictures, decoded as far down as they are needed.

Pillow decodes with the same library (libjpeg-turbo), so that the pixels are the same to the bit;
but it decodes whole pictures, into four bytes a pixel, and copies them twice. Whatever is unusual
is left to it: `frame_of` and `decode_rows` give None, and its word counts.
"""

from __future__ import annotations

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
# what libjpeg says of rows that it did not expect before the mark of the end
_SKIPPED = "extraneous bytes before marker 0xd9"


@dataclass(frozen=True)
class Frame:
    """What a JPEG file holds.

    Attributes:
        height, width: as stored, before any rotation.
        grey: of one colour.
        height_at: place of the height's two bytes.
        from_top: its rows stand in the file from top to bottom, and no marker among them.
        familiar: the file has no segment that Pillow would have to be asked about.
    """

    height: int
    width: int
    grey: bool
    height_at: int
    from_top: bool
    familiar: bool


def frame_of(data: bytes) -> Frame | None:
    """A file's frame; None if it is no JPEG file, or an unusual one."""
    at, last, start, familiar, restarts = 2, len(data) - 4, 0, True, False
    if data[:2] != b"\xff\xd8":
        return None
    while at < last and data[at] == 0xFF:
        kind, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        after = at + 2 + length
        if kind == _SCAN:
            if not start or after >= len(data):
                return None
            in_one = data[start + 1] != _PROGRESSIVE and data[at + 4] == data[start + 9]
            return _framed(data, start, in_one and not restarts, familiar)
        if kind in (_BASELINE, _EXTENDED, _PROGRESSIVE):
            if start or at + 9 > last or length != 8 + 3 * data[at + 9] or data[at + 4] != 8:
                return None
            start = at
        elif kind not in _TABLES:
            return None
        elif length < _FAMILIAR.get(kind, 1 << 16) or data[at + 4 : at + 8] == _SEVERAL_PICTURES:
            familiar = False
        restarts |= kind == _RESTARTS
        at = after
    return None


def _framed(data: bytes, start: int, from_top: bool, familiar: bool) -> Frame | None:
    """The frame whose segment starts there."""
    height, width = (int.from_bytes(data[start + i : start + i + 2], "big") for i in (5, 7))
    colours = data[start + 9]
    if colours not in (1, 3) or not height or not width:
        return None
    return Frame(height, width, colours == 1, start + 5, from_top, familiar)


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
    if frame.from_top and bottom + _CONTEXT < rows:
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
        # it names what is wrong first: if that is the skipped rest, all before it was right; and
        # the file goes on to its proper end, so that Pillow would not refuse it
        return pixels if rows < frame.height and _SKIPPED in str(error) else None
    return pixels if found.shape == pixels.shape else None
