"""Scores of label maps against pixel-by-pixel counting in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdistill.evaluation.segmentation import confusion_matrix, score_masks

Pairs = list[tuple[int, Tensor, Tensor]]


def random_pairs(seed: int, images: int, classes: int, unlabelled: float = 0.3) -> Pairs:
    """Maps of uneven sizes; the last class is never labelled, the one before never predicted."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(images):
        size = tuple(rng.integers(1, 9, 2))
        label = rng.integers(0, classes - 1, size)
        label[rng.random(size) < unlabelled] = -1
        guess = rng.integers(0, classes, size)
        guess[guess == classes - 2] = classes - 1
        pairs.append((i, torch.from_numpy(guess), torch.from_numpy(label)))
    return pairs


def counted(pairs: Pairs, classes: int) -> tuple[list[list[int]], list[float]]:
    """Confusion matrix and IoUs, one pixel at a time."""
    matrix = [[0] * classes for _ in range(classes)]
    for _, guess, label in pairs:
        for row in range(label.shape[0]):
            for column in range(label.shape[1]):
                if label[row, column] >= 0:
                    matrix[int(label[row, column])][int(guess[row, column])] += 1
    ious = []
    for c in range(classes):
        union = sum(matrix[c]) + sum(row[c] for row in matrix) - matrix[c][c]
        ious.append(matrix[c][c] / union if union else math.nan)
    return matrix, ious


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(3, 6))
def test_scores_equal_counting_pixel_by_pixel(seed: int, images: int, classes: int) -> None:
    pairs = random_pairs(seed, images, classes)
    matrix, ious = counted(pairs, classes)
    scores = score_masks(iter(pairs), images=images, classes=classes)
    assert scores.confusion.tolist() == matrix
    assert scores.iou.tolist() == pytest.approx(ious, nan_ok=True)
    present = [iou for iou in ious if not math.isnan(iou)]
    right, total = sum(matrix[c][c] for c in range(classes)), sum(map(sum, matrix))
    if not total:
        return
    assert scores.miou == pytest.approx(sum(present) / len(present))
    assert scores.aacc == pytest.approx(right / total)
    shares = [matrix[c][c] / sum(matrix[c]) for c in range(classes) if sum(matrix[c])]
    assert scores.macc == pytest.approx(sum(shares) / len(shares))


def test_a_class_that_is_only_predicted_counts_as_missed() -> None:
    label, guess = torch.tensor([[0, 0]]), torch.tensor([[0, 2]])
    scores = score_masks(iter([(0, guess, label)]), images=1, classes=4)
    assert scores.iou.tolist() == pytest.approx([0.5, math.nan, 0.0, math.nan], nan_ok=True)
    assert scores.miou == 0.25
    assert scores.accuracy.tolist() == pytest.approx([0.5, *[math.nan] * 3], nan_ok=True)


def test_what_is_predicted_on_unlabelled_pixels_does_not_matter() -> None:
    label = torch.tensor([[0, -1, 1]])
    one, two = (
        confusion_matrix(torch.tensor([[0, guess, 1]]), label, classes=2) for guess in (0, 1)
    )
    assert torch.equal(one, two)
    assert one.sum() == 2


def test_each_images_own_mean() -> None:
    pairs = random_pairs(3, 5, 4)
    pairs[2] = (2, pairs[2][1], torch.full_like(pairs[2][2], -1))
    scores = score_masks(iter(pairs), images=5, classes=4)
    alone = [
        score_masks(iter([(0, guess, label)]), images=1, classes=4).miou
        for _, guess, label in pairs
    ]
    assert scores.by_image.tolist() == pytest.approx(alone, nan_ok=True)
    assert math.isnan(alone[2])


def test_shares_of_several_processes_are_put_in_order() -> None:
    pairs = random_pairs(1, 5, 3)
    whole = score_masks(iter(pairs), images=5, classes=3)
    tables: list[Tensor] = []

    def keep(table: Tensor) -> Tensor:
        tables.append(table)
        raise StopIteration

    for share in (pairs[0::2], pairs[1::2]):
        with pytest.raises(StopIteration):
            score_masks(iter(share), images=5, classes=3, gather=keep)
    other = score_masks(iter(pairs[1::2]), images=5, classes=3, gather=lambda _: torch.cat(tables))
    assert torch.equal(whole.counts, other.counts)


def test_an_image_left_out_is_noticed() -> None:
    with pytest.raises(AssertionError):
        score_masks(iter(random_pairs(0, 3, 3)[:2]), images=3, classes=3)


def test_standard_error_over_images() -> None:
    """Images that are all alike leave no doubt; else it is the spread of resampled means."""
    _, guess, label = random_pairs(0, 1, 3)[0]
    alike = score_masks(iter([(i, guess, label) for i in range(4)]), images=4, classes=3)
    assert alike.miou_error() == pytest.approx(0, abs=1e-12)
    label = torch.zeros(1, 1, dtype=torch.long)
    coins = [(i, torch.full((1, 1), i % 2), label) for i in range(50)]
    scores = score_masks(iter(coins), images=50, classes=1 + 1)
    # class 1 is only ever predicted: its IoU is 0, and the mean is half the share of heads
    assert scores.miou_error() == pytest.approx(0.5 * math.sqrt(0.25 / 50), rel=0.1)
