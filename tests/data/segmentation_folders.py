"""Small segmentation data sets on disk, in the layouts that the project knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("left", "right", "dot")


def scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and its classes 0..2: two halves of different colours, and a square on them."""
    classes = np.zeros((height, width), dtype=np.uint8)
    classes[:, int(rng.integers(width // 4, 3 * width // 4)) :] = 1
    side = min(height, width) // 2
    top, left = int(rng.integers(height - side)), int(rng.integers(width - side))
    classes[top : top + side, left : left + side] = 2
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 220]])
    noisy = colours[classes] + rng.integers(-30, 31, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8), classes


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def ade20k(
    root: Path,
    *,
    train: int = 8,
    val: int = 4,
    size: tuple[int, int] = (24, 32),
    names: Sequence[str] | None = NAMES,
    seed: int = 0,
) -> Path:
    """ADE20K's layout: 0 is unlabelled (the top row), classes begin at 1."""
    rng = np.random.default_rng(seed)
    for part, count in (("training", train), ("validation", val)):
        for i in range(count):
            pixels, classes = scene(rng, size[0], size[1] + 2 * (i % 3))
            values = classes + 1
            values[0] = 0
            save(root / "images" / part / f"{i:03d}.png", pixels)
            save(root / "annotations" / part / f"{i:03d}.png", values)
    if names is not None:
        (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root
