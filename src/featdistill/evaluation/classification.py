"""How good a classifier is: every image once, whatever the batch or the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featdistill.data.loader import Share, ordered_batches, plainly
from featdistill.data.sources import Source
from featdistill.data.views import EvalView
from featdistill.models.backbone import Backbone


@dataclass(frozen=True)
class Scores:
    """Of a classifier on n images.

    Attributes:
        top1, top5: accuracies in 0..1 (top5: of the best five, or of all if there are fewer).
        loss: mean cross-entropy, nats.
        predictions, labels: (n,) int64, in the source's order.
    """

    top1: float
    top5: float
    loss: float
    predictions: Tensor
    labels: Tensor


@torch.no_grad()
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
    training = classifier.training
    classifier.eval()
    device = classifier.mean.device
    view = EvalView(classifier.image_size[0], crop)
    rows = []
    loader = ordered_batches(source, view, batch_size=batch_size, workers=workers, share=share)
    for batch in plainly(loader):
        assert batch.labels is not None
        logits = classifier(batch.to(device).as_float().images).logits
        assert logits is not None
        logits = logits.float().cpu()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        loss = F.cross_entropy(logits, batch.labels, reduction="none").double()
        in_five = (best == batch.labels[:, None]).any(1).double()
        exact = torch.stack([batch.indices.double(), batch.labels.double(), best[:, 0].double()])
        rows.append(torch.cat([exact, in_five[None], loss[None]]).T)
    classifier.train(training)
    table = gather(torch.cat(rows) if rows else torch.empty(0, 5, dtype=torch.float64))
    table = table[table[:, 0].argsort()]
    labels, predictions = table[:, 1].long(), table[:, 2].long()
    return Scores(
        top1=float((labels == predictions).double().mean()),
        top5=float(table[:, 3].mean()),
        loss=float(table[:, 4].mean()),
        predictions=predictions,
        labels=labels,
    )
