"""Image and mask are cut alike, by address alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdistill.core.errors import DataError
from featdistill.data.joint_views import ScoringView, TrainingCrop, distort, fitted, resize_pair
from featdistill.data.loader import ordered_batches, plainly, training_batches
from featdistill.data.masks import UNLABELLED
from featdistill.data.segmentation import open_segmentation
from tests.data.segmentation_folders import ade20k, save

FILL = (255, 0, 255)


def blobs(height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Large patches of two classes, painted in the image as 30 and 220 in every channel."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, 4, 4, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0, 0]
    mask = (smooth > smooth.median()).to(torch.int16)
    return torch.where(mask == 1, 220, 30).to(torch.uint8).expand(3, -1, -1).contiguous(), mask


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(40, 120),
    st.integers(40, 120),
    st.sampled_from([(48, 48), (32, 64), (100, 20)]),
)
def test_image_and_mask_stay_together(seed: int, height: int, width: int, size: tuple) -> None:
    image, mask = blobs(height, width, seed)
    view = TrainingCrop(size, short=56, colour=0.0, fill=FILL)
    seen, classes = view(image, mask, (0, 0, seed))
    assert seen.shape == (3, *size)
    assert classes.shape == size
    assert (seen.dtype, classes.dtype) == (torch.uint8, torch.int16)
    labelled = classes != UNLABELLED
    # what was filled is unlabelled, and nothing else is
    filled = (seen == torch.tensor(FILL, dtype=torch.uint8)[:, None, None]).all(0)
    assert torch.equal(filled, ~labelled)
    bright = seen[0] > 125
    agree = (bright == (classes == 1))[labelled].float().mean()
    assert agree > 0.97


def test_masks_are_not_half_a_pixel_beside() -> None:
    """An edge in the middle stays in the middle, at twice and at half the size."""
    mask = (torch.arange(16).expand(16, -1) >= 8).to(torch.int16)
    image = (mask * 255).to(torch.uint8).expand(3, -1, -1)
    for side in (8, 24, 32):
        seen, classes = resize_pair(image, mask, (side, side))
        assert int(classes[0].sum()) == side // 2
        assert torch.equal(seen[0] > 127, classes == 1)
        assert set(classes.unique().tolist()) == {0, 1}, "no class in between"


def test_a_view_is_a_function_of_its_address() -> None:
    image, mask = blobs(80, 90)
    view = TrainingCrop((40, 40), short=60)
    first = view(image, mask, (1, 2, 3))
    torch.manual_seed(1234)
    np.random.seed(99)
    again = view(image, mask, (1, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.equal(first[0], view(image, mask, other)[0])


def test_half_of_the_views_are_mirrored() -> None:
    image, mask = torch.zeros(3, 20, 20, dtype=torch.uint8), torch.zeros(20, 20, dtype=torch.int16)
    mask[:, :10] = 1
    view = TrainingCrop((20, 20), short=20, scale=(1.0, 1.0), largest=1.0, colour=0.0)
    left = [int(view(image, mask, (0, 0, i))[1][0, 0]) for i in range(400)]
    assert 160 < sum(left) < 240
    still = replace(view, flip=False)
    assert all(int(still(image, mask, (0, 0, i))[1][0, 0]) == 1 for i in range(20))


def test_a_class_that_fills_the_crop_is_drawn_again() -> None:
    """A tenth of the picture is class 1: without the limit most crops lack it."""
    image, mask = torch.zeros(3, 60, 60, dtype=torch.uint8), torch.zeros(60, 60, dtype=torch.int16)
    mask[:, 20:24] = 1
    view = TrainingCrop((12, 12), short=60, scale=(1.0, 1.0), colour=0.0)
    share = [
        np.mean([int((v(image, mask, (0, 0, i))[1] == 1).any()) for i in range(200)])
        for v in (replace(view, largest=2.0), view)
    ]
    assert share[0] < 0.4
    assert share[1] > 0.8


def test_a_mask_without_a_label_ends() -> None:
    image, mask = blobs(30, 30)
    mask.fill_(UNLABELLED)
    assert (TrainingCrop((16, 16), short=30)(image, mask, (0, 0, 0))[1] == UNLABELLED).all()


def test_sizes_keep_the_aspect() -> None:
    """ADE20K's (2048, 512): the short side, unless the long one would pass four times it."""
    assert fitted(600, 800, 512) == (512, 683)
    assert fitted(100, 1000, 512) == (205, 2048)
    image, mask = blobs(60, 80)
    seen, whole = ScoringView(30)(image, mask, (0, 0, 0))
    assert seen.shape == (3, 30, 40)
    assert torch.equal(whole, mask)


def test_colours_change_as_much_as_they_may() -> None:
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    image[0] = 140
    rng = np.random.default_rng(0)
    assert torch.equal(distort(image, rng, 0.0), image)
    seen = torch.stack([distort(image, rng, 1.0)[:, 0, 0] for _ in range(300)]).float()
    # (140 + 32) * 1.5 at most, pushed further apart by saturation
    assert seen.std(0).min() > 10
    assert seen.min() < 60
    assert seen.max() > 200
    plain = torch.stack([distort(image, rng, 0.5)[:, 0, 0] for _ in range(300)]).float()
    untouched = (plain == image[:, 0, 0]).all(1).float().mean()
    assert 0.02 < untouched < 0.12  # 1 in 16


def test_batches_carry_masks_whatever_the_workers(tmp_path: Path) -> None:
    train = open_segmentation(str(ade20k(tmp_path))).train
    view = TrainingCrop((16, 16), short=20)
    runs = [
        list(training_batches(train, view, batch_size=4, seed=3, start=1, stop=3, workers=workers))
        for workers in (0, 2)
    ]
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one.images, two.images)
        assert one.masks is not None
        assert two.masks is not None
        assert torch.equal(one.masks, two.masks)
        assert one.masks.shape == (4, 16, 16)
        assert one.labels is None
        halves = one.split(2)
        assert torch.equal(torch.cat([h.masks for h in halves if h.masks is not None]), one.masks)


def test_scoring_sees_every_pair_once_at_its_own_size(tmp_path: Path) -> None:
    val = open_segmentation(str(ade20k(tmp_path))).val
    assert val is not None
    batches = list(ordered_batches(val, ScoringView(12), batch_size=1))
    assert [tuple(b.masks.shape) for b in batches if b.masks is not None] == [
        (1, 24, 32 + 2 * (i % 3)) for i in range(4)
    ]
    assert all(min(b.images.shape[-2:]) == 12 for b in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_mask_is_replaced_and_a_wrong_one_stops(tmp_path: Path, workers: int) -> None:
    train = open_segmentation(str(ade20k(tmp_path))).train
    view = TrainingCrop((16, 16), short=20)

    def batches() -> list:
        loader = training_batches(
            train, view, batch_size=8, seed=0, start=0, stop=1, workers=workers
        )
        return list(plainly(loader))

    file = tmp_path / "annotations/training/005.png"
    file.write_bytes(b"nothing")
    (batch,) = batches()
    assert [(r.index, "005.png" in r.reason) for r in batch.replaced] == [(5, True)]
    save(file, np.full((24, 36), 77, dtype=np.uint8))
    with pytest.raises(DataError, match=r"005\.png' holds 77, which is no class"):
        batches()
