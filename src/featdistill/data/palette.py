"""A colour for each class, and class maps laid over images."""

from __future__ import annotations

import colorsys

import numpy as np

_GOLDEN = 0.61803398875  # of a turn of the colour wheel: neighbours differ most


def palette(classes: int) -> np.ndarray:
    """(K, 3) uint8, distinct for the eye for the first few dozen."""
    colours = [
        colorsys.hsv_to_rgb(
            (0.02 + i * _GOLDEN) % 1, (0.85, 0.6, 0.95)[i // 6 % 3], (0.95, 0.75, 0.55)[i // 3 % 3]
        )
        for i in range(classes)
    ]
    return np.round(255 * np.array(colours)).astype(np.uint8)


def overlay(image: np.ndarray, classes: np.ndarray, share: float = 0.6) -> np.ndarray:
    """Class colours over an image.

    Args:
        image: (height, width, 3) uint8.
        classes: (height, width) class numbers; negative ones show the image alone.
        share: of the colour.
    """
    labelled = classes >= 0
    count = int(classes.max()) + 1 if labelled.any() else 1
    mixed = image.astype(np.float32)
    mixed[labelled] = (1 - share) * mixed[labelled] + share * palette(count)[classes[labelled]]
    return np.round(mixed).clip(0, 255).astype(np.uint8)
