"""Made photographs: deterministic JPEG files that take a decoder as long as real ones.

Their spectrum falls with frequency as that of scenes does (Field 1987), and quality and colour
sampling are those of most ImageNet files; at 500x400 they have as many bytes as those: 110 KB.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from featdistill.core.seeds import generator

_FALL = 1.61  # amplitude ~ 1 / frequency ** _FALL: 110 KB
_QUALITY = 96
_COLOURFUL = 0.35  # contrast of the two colour channels beside brightness's
_CONTRAST, _BRIGHTNESS = 52, 118  # levels


def photograph(number: int, *, height: int = 400, width: int = 500) -> bytes:
    """JPEG file `number`."""
    rng = generator("photograph", number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no mean
    planes = []
    for contrast in (1.0, _COLOURFUL, _COLOURFUL):
        noise = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**_FALL
        plane = np.fft.irfft2(noise, (height, width))
        planes.append(plane / plane.std() * contrast * _CONTRAST)
    colours = Image.fromarray(_bytes(np.stack(planes, -1)), "YCbCr").convert("RGB")
    file = io.BytesIO()
    colours.save(file, "JPEG", quality=_QUALITY, subsampling="4:4:4")
    return file.getvalue()


def _bytes(planes: np.ndarray) -> np.ndarray:
    centre = np.array([_BRIGHTNESS, 128, 128])
    return np.rint(planes + centre).clip(0, 255).astype(np.uint8)


def write_photographs(folder: Path, count: int) -> None:
    """So many of them, as a folder of images."""
    for number in range(count):
        (folder / f"{number:05}.jpg").write_bytes(photograph(number))
