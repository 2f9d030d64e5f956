"""JPEG files of every kind for tests, and what Pillow reads of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def jpeg(
    height: int,
    width: int,
    *,
    seed: int = 0,
    mode: str = "RGB",
    orientation: int = 1,
    **options: Any,
) -> bytes:
    """A file with noise, slopes and edges; options as Pillow's."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([3 * x + y, 255 - 2 * x, 5 * y + x * (x > width // 2)], -1) % 256
    noisy = (slopes + rng.normal(0, 12, slopes.shape)).clip(0, 255).astype(np.uint8)
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    file = io.BytesIO()
    Image.fromarray(noisy).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def as_pillow_reads(data: bytes) -> Tensor:
    """(3, height, width) uint8, by nothing of this project."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)
