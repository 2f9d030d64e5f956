"""A segmenter over held-out images, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from featdistill.data.joint_views import ScoringView
from featdistill.data.loader import Share, ordered_batches, plainly
from featdistill.data.masks import PairSource
from featdistill.evaluation.segmentation import SegmentationScores, pixels, score_masks
from featdistill.evaluation.sliding import Looks, predict_mask
from featdistill.models.segmenter import Segmenter


@torch.no_grad()
def score_segmenter(
    segmenter: Segmenter,
    held: PairSource,
    *,
    short: int,
    looks: Looks,
    workers: int | None = None,
    share: Share = Share(),  # noqa: B008 - immutable
    total: Callable[[Tensor], Tensor] = lambda x: x,
    gather: Callable[[Tensor], Tensor] = lambda x: x,
    autocast: Callable[[], Any] = nullcontext,
    progress: Callable[[int], None] = lambda _: None,
) -> SegmentationScores:
    """Score a segmenter on every labelled pixel at the labels' own size.

    Args:
        short: the images' short side at scale 1.
        looks: how each is looked at.
        share: this process among all; each scores its part.
        total, gather: sum and concatenation over processes.
        autocast: the precision's context.
        progress: called with the number of images done.
    """
    training = segmenter.training
    segmenter.eval()
    device = segmenter.backbone.mean.device

    def predicted() -> Iterator[tuple[int, Tensor, Tensor]]:
        view = ScoringView(short)
        loader = ordered_batches(held, view, batch_size=1, workers=workers, share=share)
        for done, batch in enumerate(plainly(loader), 1):
            label = pixels(batch)
            image = batch.to(device).as_float().images[0]
            with autocast():
                found = predict_mask(
                    segmenter.logits, image, (label.shape[0], label.shape[1]), looks
                )
            yield int(batch.indices[0]), found, label
            progress(done)

    classes = len(segmenter.class_names)
    scores = score_masks(
        predicted(),
        images=len(held),
        classes=classes,
        total=lambda x: total(x.to(device)),
        gather=gather,
    )
    segmenter.train(training)
    return scores
