"""How good a classifier is: every image once, whatever the batch or the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featdistill.data.loader import Share, ordered_batches, plainly
from featdistill.data.sources import Source
from featdistill.data.views import EvalView, View
from featdistill.models.backbone import Backbone
from featdistill.models.modes import evaluating


@dataclass(frozen=True)
class Scores:
    """Of a classifier on n images.

    Attributes:
        top1, top5: accuracies in 0..1 (top5: of the best five, or of all if there are fewer).
        loss: mean cross-entropy, nats.
        calibration_error: of the best guesses' probabilities, 0..1 (`calibration_error`).
        by_class: (classes,) float64, accuracy on each class's images; NaN where there is none.
        predictions, labels: (n,) int64, in the source's order.
    """

    top1: float
    top5: float
    loss: float
    calibration_error: float
    by_class: Tensor
    predictions: Tensor
    labels: Tensor

    @property
    def mean_by_class(self) -> float:
        """Mean of the classes' accuracies, over the classes that have images."""
        return float(self.by_class.nanmean())


def calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error: how far confidence is from accuracy, mean over images.

    Images fall into bins of equal width by their confidence, each open at its lower end; a bin
    counts with |its accuracy - its mean confidence|. Source: Guo et al. 2017, equation 3 (15 bins).

    Args:
        confidence: (n,) probability of the best guess, 0..1.
        correct: (n,) whether it was right.
    """
    bin_of = (confidence.double() * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, bin_of, correct.double() - confidence.double())
    return float(gaps.abs().sum() / len(confidence))


def accuracy_by_class(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(classes,) float64: share of each class's images that were named right; NaN without any."""
    hits = torch.bincount(labels[predictions == labels], minlength=classes)
    return hits.double() / torch.bincount(labels, minlength=classes)


def judge(logits: Tensor, labels: Tensor) -> Tensor:
    """What `summary` needs of each image, (n, 5) float64 on the CPU.

    Args:
        logits: (n, K), `labels` (n,).

    Returns:
        Columns: label, best guess, whether the label is among the best five, cross-entropy, and the
        best guess's probability.
    """
    logits, labels = logits.float().cpu(), labels.cpu()
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    loss = F.cross_entropy(logits, labels, reduction="none").double()
    confidence = logits.double().softmax(1).amax(1)
    in_five = (best == labels[:, None]).any(1).double()
    exact = torch.stack([labels.double(), best[:, 0].double()])
    return torch.cat([exact, torch.stack([in_five, loss, confidence])]).T


def summary(table: Tensor, *, classes: int) -> Scores:
    """The scores of all images that `judge` saw, in their order."""
    labels, predictions = table[:, 0].long(), table[:, 1].long()
    return Scores(
        top1=float((labels == predictions).double().mean()),
        top5=float(table[:, 2].mean()),
        loss=float(table[:, 3].mean()),
        calibration_error=calibration_error(table[:, 4], labels == predictions),
        by_class=accuracy_by_class(predictions, labels, classes),
        predictions=predictions,
        labels=labels,
    )


def score(
    classifier: Backbone,
    source: Source,
    *,
    batch_size: int,
    crop: float = 0.875,
    workers: int | None = None,
    share: Share = Share(),  # noqa: B008 - immutable
    gather: Callable[[Tensor], Tensor] = lambda x: x,
) -> Scores:
    """Score a classifier on labelled images.

    Args:
        share: this process among all; each scores its part.
        gather: concatenation over processes.
    """

    def logits_of(images: Tensor) -> Tensor:
        logits: Tensor | None = classifier(images).logits
        assert logits is not None
        return logits

    with evaluating(classifier):
        return score_logits(
            logits_of,
            source,
            EvalView(classifier.image_size[0], crop),
            device=classifier.mean.device,
            classes=classifier.num_classes,
            batch_size=batch_size,
            workers=workers,
            share=share,
            gather=gather,
        )


@torch.no_grad()
def score_logits(
    logits_of: Callable[[Tensor], Tensor],
    source: Source,
    view: View,
    *,
    device: torch.device,
    classes: int,
    batch_size: int,
    workers: int | None = None,
    share: Share = Share(),  # noqa: B008 - immutable
    gather: Callable[[Tensor], Tensor] = lambda x: x,
) -> Scores:
    """Score whatever makes (B, K) logits of (B, 3, height, width) images in [0, 1]; see `score`."""
    rows = []
    loader = ordered_batches(source, view, batch_size=batch_size, workers=workers, share=share)
    for batch in plainly(loader):
        assert batch.labels is not None
        logits = logits_of(batch.to(device).as_float().images)
        rows.append(torch.cat([batch.indices.double()[:, None], judge(logits, batch.labels)], 1))
    table = gather(torch.cat(rows) if rows else torch.empty(0, 6, dtype=torch.float64))
    table = table[table[:, 0].argsort()]
    # none twice, none left out, whatever the processes
    assert torch.equal(table[:, 0], torch.arange(len(source), dtype=torch.float64))
    return summary(table[:, 1:], classes=classes)
