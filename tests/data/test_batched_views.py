"""A batch's crops are, to the bit, those of each image by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featdistill.core.seeds import generator
from featdistill.data import batched_views
from featdistill.data.batched_views import BatchedCrop, Cutter, batched
from featdistill.data.views import ContrastiveView, CropView, FinetuneView, View, random_box

CPU = torch.device("cpu")
# what torchvision resizes in fixed point; elsewhere it resizes floats and rounds once
EXACT = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def crop_of(view: View) -> BatchedCrop:
    found = batched(view)
    assert found is not None
    return found


def finetune(size: int, **changes: object) -> FinetuneView:
    options = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "flip": True, "randaugment": None}
    return FinetuneView(size=size, mean=(0.5, 0.5, 0.5), **{**options, **changes})  # type: ignore[arg-type]


def boxes_one_by_one(
    crop: BatchedCrop, seed: int, epoch: int, heights: np.ndarray, widths: np.ndarray
) -> list[tuple[int, ...]]:
    found = []
    for index, (h, w) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        rng = generator(crop.name, seed, epoch, index)
        box = random_box(rng, h, w, crop.scale, crop.ratio)
        flip = crop.flip and rng.random() < 0.5
        found.append((box.top, box.left, box.height, box.width, int(flip)))
    return found


def boxes_at_once(
    crop: BatchedCrop, seed: int, epoch: int, heights: np.ndarray, widths: np.ndarray
) -> list[tuple[int, ...]]:
    b = crop.boxes(seed, epoch, np.arange(len(heights)), heights, widths)
    columns = (b.top, b.left, b.height, b.width, b.flip.astype(int))
    return list(zip(*(c.tolist() for c in columns), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 400),
    sizes=st.lists(
        st.tuples(st.integers(1, 300), st.integers(1, 300)) | st.just((32, 32)),
        min_size=1,
        max_size=24,
    ),
    scale=st.sampled_from([(0.08, 1.0), (0.67, 1.0), (1.0, 1.0), (0.2, 0.9), (1e-4, 2e-4)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.2, 4.0)]),
    flip=st.booleans(),
    name=st.sampled_from(["crop", "finetune"]),
)
def test_boxes_are_those_of_each_address(seed, epoch, sizes, scale, ratio, flip, name) -> None:  # type: ignore[no-untyped-def]
    crop = BatchedCrop(name, 8, scale, ratio, flip, bicubic=False)
    heights, widths = np.array(sizes).T
    want = boxes_one_by_one(crop, seed, epoch, heights, widths)
    assert boxes_at_once(crop, seed, epoch, heights, widths) == want


def test_most_boxes_are_drawn_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where they cannot be, since a number wants to be drawn again, one by one."""
    sides = np.full(400, 32)
    crop = crop_of(CropView(8))
    want = boxes_one_by_one(crop, 1, 2, sides, sides)
    alone = []
    real = batched_views.generator
    monkeypatch.setattr(
        batched_views, "generator", lambda *parts: alone.append(parts) or real(*parts)
    )
    assert boxes_at_once(crop, 1, 2, sides, sides) == want
    assert len(alone) < 20
    monkeypatch.setattr(
        batched_views, "streams", lambda many, blocks: np.zeros((len(many), 4 * blocks), np.uint64)
    )
    # a 32-bit zero is one of the few numbers that Lemire's method cannot use
    assert boxes_at_once(crop, 1, 2, sides, sides) == want
    assert len(alone) >= 400


def made(count: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Images of many sizes, with hard edges, in the corners of (n, height, 3, width)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, height, 3, width), np.uint8)
    pixels[::3] = np.where(pixels[::3] > 127, 255, 0)
    low = np.array([max(1, height // 3), max(1, width // 3)])
    return torch.from_numpy(pixels), rng.integers(low, [height + 1, width + 1], (count, 2))


CASES = [(32, 32, 32), (32, 32, 48), (20, 31, 7), (150, 60, 8), (9, 5, 24), (1, 1, 4)]


@pytest.mark.parametrize("make", [CropView, finetune])
@pytest.mark.parametrize(("height", "width", "size"), CASES)
def test_views_are_those_of_each_image(make, height: int, width: int, size: int) -> None:  # type: ignore[no-untyped-def]
    view, count = make(size), 60
    pixels, sizes = made(count, height, width)
    crop = crop_of(view)
    boxes = crop.boxes(5, 1, np.arange(count), *sizes.T)
    found = Cutter(crop, height=height, width=width, device=CPU)(pixels, np.arange(count), boxes)
    assert found.shape == (count, 3, size, size)
    assert found.dtype == torch.uint8
    for index, (h, w) in enumerate(sizes):
        image = pixels[index, :h, :, :w].transpose(0, 1).contiguous()
        [want] = view(image, (5, 1, index))
        off = (found[index].int() - want.int()).abs().max()
        assert off <= (0 if EXACT else 1), (index, h, w)
    assert found.float().std() > 10, "they are pictures of something"


def test_large_sums_are_kept_in_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fixed-point sums pass 2^24, or products of float32 are rounded by choice."""
    small = crop_of(CropView(32))
    assert Cutter(small, height=32, width=32, device=CPU).dtype == torch.float32
    assert Cutter(crop_of(CropView(4)), height=99, width=9, device=CPU).dtype == torch.float64
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert Cutter(small, height=32, width=32, device=CPU).dtype == torch.float64


def test_low_precision_around_it_changes_nothing() -> None:
    pixels, sizes = made(17, 12, 10)
    crop, rows = crop_of(CropView(8)), np.arange(17)
    boxes = crop.boxes(0, 0, rows, *sizes.T)
    cutter = Cutter(crop, height=12, width=10, device=CPU)
    with torch.autocast("cpu", torch.bfloat16):
        found = cutter(pixels, rows, boxes)
    assert torch.equal(found, cutter(pixels, rows, boxes))


def test_parts_of_a_batch_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, sizes = made(17, 12, 10)
    crop, rows = crop_of(CropView(8)), np.arange(17)
    boxes = crop.boxes(0, 0, rows, *sizes.T)
    cutter = Cutter(crop, height=12, width=10, device=CPU)
    whole = cutter(pixels, rows, boxes)
    monkeypatch.setattr(batched_views, "_TEMPORARY", {"cpu": 4 * 3 * 8 * 12 * 5})
    cut, parts = cutter._cut, []
    monkeypatch.setattr(cutter, "_cut", lambda p, told: parts.append(told.shape[1]) or cut(p, told))
    assert torch.equal(cutter(pixels, rows, boxes), whole)
    assert parts == [5, 5, 5, 2]


def test_what_cannot_be_cut_by_the_batch() -> None:
    assert batched(ContrastiveView(8)) is None
    assert batched(finetune(8, randaugment="rand-m9-mstd0.5-inc1")) is None
