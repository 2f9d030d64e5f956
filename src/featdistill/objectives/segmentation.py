"""Segmentation: cross-entropy on every labelled pixel, and on the auxiliary head's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featdistill.core.types import Batch, Loss
from featdistill.models.segmenter import SegmentationLogits, Segmenter

_UNLABELLED = -1


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy, nats: summed over labelled pixels, divided by all pixels.

    As mmsegmentation's default: an unlabelled pixel counts as learnt. So the mean over parts of a
    batch is the whole batch's loss, and a crop without any label gives 0 and not 0 / 0.

    Args:
        logits: (B, K, H, W).
        masks: (B, H, W) class numbers, -1 where unlabelled.
    """
    total = F.cross_entropy(logits.float(), masks.long(), ignore_index=_UNLABELLED, reduction="sum")
    return total / masks.numel()


class Segmentation(nn.Module):
    """Train a segmenter.

    Args:
        segmenter: the model.
        auxiliary_weight: of the auxiliary head's loss, if there is such a head.
    """

    def __init__(self, segmenter: Segmenter, *, auxiliary_weight: float = 0.4) -> None:
        super().__init__()
        self.segmenter, self.auxiliary_weight = segmenter, auxiliary_weight

    def forward(self, batch: Batch) -> Loss:
        assert batch.masks is not None
        logits: SegmentationLogits = self.segmenter(batch.images, stream=batch.stream)
        total = main = pixel_loss(logits.main, batch.masks)
        parts = {}
        if logits.auxiliary is not None:
            beside = pixel_loss(logits.auxiliary, batch.masks)
            total = main + self.auxiliary_weight * beside
            parts = {"main_loss": main.detach(), "auxiliary_loss": beside.detach()}
        with torch.no_grad():
            seen = batch.masks != _UNLABELLED
            hits = ((logits.main.argmax(1) == batch.masks) & seen).sum()
            parts["train_accuracy"] = hits / seen.sum().clamp(min=1)
        return Loss(total, parts)
