"""Mixup, cutmix and erasing against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import batch, halves
from torch import Tensor

from featdistill.core.seeds import SampleStream
from featdistill.core.types import Batch
from featdistill.objectives.mixing import erase, mix

K = 5
OFF = {"mixup": 0.0, "cutmix": 0.0, "probability": 1.0, "switch": 0.5, "smoothing": 0.0}


def mixed(data: Batch, **options: float) -> tuple[Tensor, Tensor]:
    assert data.labels is not None
    assert data.stream is not None
    return mix(data.images, data.labels, data.stream, classes=K, **{**OFF, **options})


def noise(step: int = 0, count: int = 6, seed: int = 0) -> Batch:
    return batch(count, 16, classes=K, step=step, seed=seed)


def partner(row: int) -> int:
    return row + 1 if row % 2 == 0 else row - 1


def one_hot(label: int, smoothing: float = 0.0) -> Tensor:
    row = torch.full((K,), smoothing / K)
    row[label] += 1 - smoothing
    return row


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_is_brute_force(step: int, smoothing: float) -> None:
    data = noise(step)
    images, labels = mixed(data, mixup=0.8, smoothing=smoothing)
    x = data.images
    # the share, from one pixel; the same for all pixels, channels and pairs
    share = float((images[0, 0, 0, 0] - x[1, 0, 0, 0]) / (x[0, 0, 0, 0] - x[1, 0, 0, 0]))
    assert -1e-3 <= share <= 1 + 1e-3
    for row in range(len(x)):
        other = partner(row)
        wanted = share * x[row] + (1 - share) * x[other]
        torch.testing.assert_close(images[row], wanted, rtol=1e-3, atol=1e-4)
        soft = [one_hot(int(data.labels[i]), smoothing) for i in (row, other)]
        torch.testing.assert_close(
            labels[row], share * soft[0] + (1 - share) * soft[1], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("step", range(8))
def test_cutmix_is_brute_force(step: int) -> None:
    data = noise(step)
    images, labels = mixed(data, cutmix=1.0)
    x = data.images
    boxes = []
    for row in range(len(x)):
        other = partner(row)
        own = (images[row] == x[row]).all(0)
        taken = (images[row] == x[other]).all(0)
        assert (own ^ taken).all()
        boxes.append(taken)
        rows, columns = taken.any(1).nonzero().flatten(), taken.any(0).nonzero().flatten()
        assert int(taken.sum()) == len(rows) * len(columns)  # one rectangle
        share = float(own.float().mean())
        wanted = share * one_hot(int(data.labels[row])) + (1 - share) * one_hot(
            int(data.labels[other])
        )
        torch.testing.assert_close(labels[row], wanted)
    assert all(torch.equal(box, boxes[0]) for box in boxes)


@given(
    step=st.integers(0, 10**6),
    mixup=st.sampled_from([0.0, 0.2, 0.8]),
    cutmix=st.sampled_from([0.0, 0.5, 1.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    parts=st.sampled_from([2, 4]),
)
@settings(deadline=None, max_examples=40)
def test_labels_sum_to_one_and_micro_batches_do_not_matter(
    step: int, mixup: float, cutmix: float, smoothing: float, parts: int
) -> None:
    options = {"mixup": mixup, "cutmix": cutmix, "smoothing": smoothing, "probability": 0.8}
    data = noise(step, count=8)
    images, labels = mixed(data, **options)
    torch.testing.assert_close(labels.sum(1), torch.ones(8))
    assert float(labels.min()) >= 0
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    pieces = [mixed(part, **options) for part in halves(data, parts)]
    assert torch.equal(torch.cat([p[0] for p in pieces]), images)
    assert torch.equal(torch.cat([p[1] for p in pieces]), labels)


def kind(data: Batch, **options: float) -> str:
    images, _ = mixed(data, **options)
    if torch.equal(images, data.images):
        return "none"
    own = (images == data.images).all(1)
    return "cutmix" if own.any() or torch.equal(images[0], data.images[1]) else "mixup"


def share_of(what: str, **options: float) -> float:
    kinds = [kind(noise(step, count=2), **options) for step in range(400)]
    return kinds.count(what) / len(kinds)


def test_probability_and_switch() -> None:
    assert share_of("none", mixup=0.8, probability=0.3) == pytest.approx(0.7, abs=0.08)
    assert share_of("cutmix", mixup=0.8, cutmix=1.0, switch=0.25) == pytest.approx(0.25, abs=0.08)
    assert share_of("mixup", mixup=0.8, cutmix=1.0, switch=0.0) == pytest.approx(1, abs=0.01)


def test_off_leaves_everything() -> None:
    data = noise()
    for options in ({}, {"mixup": 0.8, "cutmix": 1.0, "probability": 0.0}):
        images, labels = mixed(data, **options)
        assert torch.equal(images, data.images)
        assert torch.equal(labels, torch.stack([one_hot(int(i)) for i in data.labels]))


def test_the_batch_itself_is_not_written_to() -> None:
    data = noise()
    before = data.images.clone()
    mixed(data, cutmix=1.0)
    erase(data.images, data.stream, probability=1.0)
    assert torch.equal(data.images, before)


def test_odd_batches_may_stay_unmixed() -> None:
    assert mixed(noise(count=3))[0].shape[0] == 3


def test_steps_and_seeds_differ() -> None:
    first = mixed(noise(), mixup=0.8)[1]
    data = noise()
    for stream in (SampleStream(0, 1, data.positions), SampleStream(1, 0, data.positions)):
        soft = mix(data.images, data.labels, stream, classes=K, **{**OFF, "mixup": 0.8})[1]
        assert not torch.equal(soft, first)


# --- erasing


def erased(data: Batch, probability: float = 0.5) -> Tensor:
    return erase(data.images, data.stream, probability=probability)


@given(step=st.integers(0, 10**6), parts=st.sampled_from([2, 4, 8]))
@settings(deadline=None, max_examples=30)
def test_erasing_is_keyed_per_sample(step: int, parts: int) -> None:
    data = noise(step, count=8)
    whole = erased(data)
    assert torch.equal(torch.cat([erased(part) for part in halves(data, parts)]), whole)


def test_erasing_follows_the_position_not_the_row() -> None:
    data = noise(count=8)
    order = torch.tensor([3, 1, 7, 0])
    some = erase(data.images[order], SampleStream(0, 0, order), probability=0.5)
    assert torch.equal(some, erased(data)[order])


def test_an_erased_box_is_noise_of_the_right_size() -> None:
    side = 48
    data = batch(64, side)
    got = erased(data, 1.0)
    values = []
    for before, after in zip(data.images, got, strict=True):
        changed = (before != after).all(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        h, w = len(rows), len(columns)
        assert int(changed.sum()) == h * w > 0
        assert torch.equal((before != after).any(0), changed)
        assert 0.02 * 0.7 <= h * w / side**2 <= 1 / 3 * 1.1
        assert 0.3 * 0.6 <= h / w <= 1 / 0.3 / 0.6
        values.append(after[:, changed].flatten())
    drawn = torch.cat(values)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.02)
    assert float(drawn.std()) == pytest.approx(1, abs=0.02)


def test_share_of_erased_images() -> None:
    data = batch(2000, 4)
    changed = (erased(data, 0.25) != data.images).flatten(1).any(1).float().mean()
    assert float(changed) == pytest.approx(0.25, abs=0.04)
    assert erase(data.images, data.stream, probability=0.0) is data.images
