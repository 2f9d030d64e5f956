"""Segmentation's loss against a loop over pixels, and what must not change it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from featdistill.core.seeds import SampleStream
from featdistill.core.types import Batch
from featdistill.models.segmenter import HeadShape, build_segmenter
from featdistill.objectives.segmentation import Segmentation, pixel_loss
from tests.models.model_zoo import images, small_vit


def masks(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 3, shape, generator=draw).to(torch.int16)


def test_the_loss_pixel_by_pixel() -> None:
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    labels = masks(2, 4, 5)
    total = 0.0
    for b in range(2):
        for row in range(4):
            for column in range(5):
                label = int(labels[b, row, column])
                if label >= 0:
                    here = logits[b, :, row, column].tolist()
                    total -= here[label] - math.log(sum(map(math.exp, here)))
    assert math.isclose(float(pixel_loss(logits, labels)), total / 40, rel_tol=1e-6)


def test_a_batch_without_a_label_is_no_nan() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((2, 4, 4), -1, dtype=torch.int16))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def objective(kind: str = "upernet", weight: float = 0.4) -> Segmentation:
    segmenter = build_segmenter(
        small_vit(depth=4),
        size=(32, 32),
        class_names=("a", "b", "c"),
        shape=HeadShape(kind=kind, channels=8, auxiliary=4),  # type: ignore[arg-type]
    )
    return Segmentation(segmenter, auxiliary_weight=weight).train()


def batch(rows: slice = slice(0, 4)) -> Batch:
    positions = torch.arange(4)[rows]
    return Batch(
        views=(images(4, 32)[rows],),
        labels=None,
        indices=positions,
        positions=positions,
        masks=masks(4, 32, 32)[rows],
        stream=SampleStream(seed=0, step=0, positions=positions),
    )


def test_the_auxiliary_head_counts_by_its_weight() -> None:
    loss = objective()(batch())
    expected = loss.parts["main_loss"] + 0.4 * loss.parts["auxiliary_loss"]
    torch.testing.assert_close(loss.total.detach(), expected)
    torch.testing.assert_close(
        objective(weight=0.0)(batch()).total.detach(), loss.parts["main_loss"]
    )
    assert 0 < loss.parts["train_accuracy"] < 1


def test_micro_batches_share_the_loss_exactly() -> None:
    """However many of their pixels are labelled: the mean over parts is the whole's."""
    learned = objective("linear")
    with torch.no_grad():
        whole = learned(batch()).total
        parts = [learned(batch(slice(i, i + 2))).total for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, whole)
