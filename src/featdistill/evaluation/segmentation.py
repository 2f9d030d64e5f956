"""How good a segmenter is: a confusion matrix over every labelled pixel at its own resolution.

n images, K classes, H W an image's own size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featdistill.core.seeds import generator
from featdistill.core.types import Batch

_DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class SegmentationScores:
    """Of a segmenter on n images; shares in 0..1, NaN where a class has no pixel to judge by.

    Attributes:
        confusion: (K, K) int64 pixels, rows: the label, columns: what was predicted.
        counts: (n, 3, K) int64 pixels of each image and class: right, predicted, labelled.
    """

    confusion: Tensor
    counts: Tensor

    @property
    def iou(self) -> Tensor:
        """(K,) float64: intersection over union; NaN for a class nowhere labelled or predicted."""
        return _iou(self.counts.sum(0))

    @property
    def accuracy(self) -> Tensor:
        """(K,) float64: share of each class's pixels that were named right; NaN without any."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that are labelled or predicted anywhere."""
        return float(self.iou.nanmean())

    @property
    def macc(self) -> float:
        """Mean of the classes' accuracies, over the classes that are labelled anywhere."""
        return float(self.accuracy.nanmean())

    @property
    def aacc(self) -> float:
        """Share of all labelled pixels that were named right."""
        return float(self.confusion.diagonal().sum().double() / self.confusion.sum())

    @property
    def by_image(self) -> Tensor:
        """(n,) float64: each image's own mean IoU; NaN for one without a labelled pixel."""
        means = _iou(self.counts).nanmean(1)
        means[self.counts[:, 2].sum(1) == 0] = float("nan")
        return means

    def miou_error(self, seed: int = 0) -> float:
        """Standard error of the mean IoU, from 1000 bootstrap samples of the images."""
        rng = generator("miou", seed)
        n = len(self.counts)
        weights = torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=_DRAWS)).double()
        drawn = weights @ self.counts.double().flatten(1)
        return float(_iou(drawn.view(_DRAWS, 3, -1)).nanmean(1).std())


def _iou(counts: Tensor) -> Tensor:
    """(..., K) from counts (..., 3, K)."""
    right, predicted, labelled = counts.double().unbind(-2)
    return right / (predicted + labelled - right)


def confusion_matrix(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(K, K) int64 pixels: labels by predictions; pixels with a negative label are left out."""
    seen = labels >= 0
    pairs = labels[seen].long() * classes + predictions[seen].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def score_masks(
    predicted: Iterator[tuple[int, Tensor, Tensor]],
    *,
    images: int,
    classes: int,
    total: Callable[[Tensor], Tensor] = lambda x: x,
    gather: Callable[[Tensor], Tensor] = lambda x: x,
) -> SegmentationScores:
    """Scores of predictions, however they are spread over processes.

    Args:
        predicted: this process's (image's number, prediction (H, W), label (H, W)).
        images: of all processes together.
        total: sum over processes.
        gather: concatenation over processes of (rows, columns).
    """
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    rows = [torch.empty(0, 1 + 3 * classes, dtype=torch.long)]
    for index, prediction, label in predicted:
        one = confusion_matrix(prediction.cpu(), label.cpu(), classes)
        confusion += one
        counts = torch.cat([one.diagonal(), one.sum(0), one.sum(1)])
        rows.append(torch.cat([torch.tensor([index]), counts])[None])
    table = gather(torch.cat(rows)).cpu()
    table = table[table[:, 0].argsort()]
    # none twice, none left out, whatever the processes
    assert torch.equal(table[:, 0], torch.arange(images)), table[:, 0]
    return SegmentationScores(total(confusion).cpu(), table[:, 1:].view(images, 3, classes))


def pixels(batch: Batch) -> Tensor:
    """The labels (H, W) of a batch of one image."""
    assert batch.masks is not None
    assert len(batch) == 1
    return batch.masks[0]
