"""The best prediction that ignores the image: each position's most frequent training class.

A segmenter that is not clearly above it has learnt where things usually are, not what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featdistill.core.errors import DataError
from featdistill.data.decode import BadImage
from featdistill.data.masks import UNLABELLED, PairSource
from featdistill.evaluation.segmentation import SegmentationScores, score_masks

_SIDE = 256  # of the grid of positions, at most
_THREADS = 4
_AT_ONCE = 64


@dataclass(frozen=True)
class PositionPrior:
    """Each position's most frequent class.

    Attributes:
        classes: (rows, columns) int64 over an image of any size.
        pixels: (K,) int64, labelled pixels of each class, on that grid.
        images: masks that it was learnt from.
    """

    classes: Tensor
    pixels: Tensor
    images: int

    def predict(self, size: tuple[int, int]) -> Tensor:
        """(H, W) int64 for an image of this size."""
        return F.interpolate(self.classes[None, None].double(), size, mode="nearest-exact")[
            0, 0
        ].long()


def learn_prior(
    source: PairSource, *, images: int = 2000, progress: Callable[[int], None] = lambda _: None
) -> PositionPrior:
    """Count classes by position in (at most so many, evenly spread) training masks.

    Where no training mask has a label, the class of most pixels stands.

    Raises:
        DataError: a mask is wrong, or none has a label.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(images, len(source))).round())
    k, counts = len(source.classes), None
    done = 0
    for mask in _masks(source, chosen.astype(int).tolist()):
        done += 1
        if counts is None:
            grid = tuple(min(_SIDE, side) for side in mask.shape)
            counts = torch.zeros(k + 1, *grid, dtype=torch.int32)
        small = F.interpolate(mask[None, None].double(), counts.shape[1:], mode="nearest-exact")
        one = small[0].long().where(small[0] != UNLABELLED, k)
        counts.scatter_add_(0, one, torch.ones_like(one, dtype=torch.int32))
        if done % _AT_ONCE == 0:
            progress(done)
    pixels = torch.zeros(k) if counts is None else counts[:k].sum((1, 2))
    if counts is None or not int(pixels.sum()):
        raise DataError(
            f"no mask of '{source.name}' has a labelled pixel",
            fix="look at the masks, and at --data.unlabelled",
        )
    best = counts[:k].argmax(0)
    best[counts[:k].sum(0) == 0] = pixels.argmax()
    return PositionPrior(best, pixels.long(), done)


def _masks(source: PairSource, chosen: list[int]) -> Iterator[Tensor]:
    def read(index: int) -> Tensor | None:
        try:
            return source.read_mask(index)
        except BadImage:
            return None  # damaged: the training loop counts and names it

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(chosen), _AT_ONCE):
            found = pool.map(read, chosen[start : start + _AT_ONCE])
            yield from (mask for mask in found if mask is not None)


def score_prior(prior: PositionPrior, held: PairSource) -> SegmentationScores:
    """The prior's scores on held-out masks."""

    def predicted() -> Iterator[tuple[int, Tensor, Tensor]]:
        for index in range(len(held)):
            label = _label(held, index)
            yield index, prior.predict((label.shape[0], label.shape[1])), label

    return score_masks(predicted(), images=len(held), classes=len(held.classes))


def _label(held: PairSource, index: int) -> Tensor:
    try:
        return held.read_mask(index)
    except BadImage as error:
        raise DataError(
            f"cannot read a mask of '{held.name}': {error}",
            fix="mend or remove it; a score needs every mask",
        ) from None
