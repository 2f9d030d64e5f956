"""Every pair's headers, looked at before long work begins: sizes, and masks in colour."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from featdistill.core.errors import DataError
from featdistill.data.decode import open_image
from featdistill.data.masks import MaskFiles, PairSource, check_mode, check_size
from featdistill.data.sources import ArrowSource, FileSource

_ORIENTATION = 0x0112
_ON_THE_SIDE = (5, 6, 7, 8)
_THREADS = 8
_AT_ONCE = 512


def check_headers(source: PairSource, progress: Callable[[int], None] = lambda _: None) -> None:
    """Look at every pair without decoding it; what cannot be read is left to the loader.

    Args:
        progress: called with the number of pairs done, now and then.

    Raises:
        DataError: a mask in colour, or of another size than its image, by name.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(source), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(source))
            list(pool.map(lambda i: _check(source, i), range(start, stop)))
            progress(stop)


def _check(source: PairSource, index: int) -> None:
    place = source.place(index)
    images, masks = source.images, source.masks
    where = masks.identify(place)
    try:
        if isinstance(masks, MaskFiles):
            mask = _mask(masks.root / masks.files[place], where)
        else:
            mask = _mask(io.BytesIO(masks.data(place)), where)
        if isinstance(images, FileSource):
            image = _upright(images.root / images.files[place])
        elif isinstance(images, ArrowSource):
            image = _upright(io.BytesIO(images.data(place)))
        else:
            return
    except DataError:
        raise
    except Exception:  # Pillow's parsers raise what they will
        return  # damaged: counted, replaced and named when it is read
    check_size(image, mask, images.identify(place), where)


def _mask(file: Path | io.BytesIO, where: str) -> tuple[int, int]:
    with open_image(file) as image:
        check_mode(image.mode, where)
        return image.height, image.width


def _upright(file: Path | io.BytesIO) -> tuple[int, int]:
    """Height and width after the rotation that the file asks for."""
    with open_image(file) as image:
        turned = image.getexif().get(_ORIENTATION) in _ON_THE_SIDE
        return (image.width, image.height) if turned else (image.height, image.width)
