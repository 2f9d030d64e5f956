"""Windows, sizes and mirrors against what they must leave unchanged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featdistill.evaluation.sliding import (
    Looks,
    Sliding,
    largest,
    predict_mask,
    sliding_logits,
    starts,
)

K = 5


@pytest.fixture
def pointwise() -> nn.Conv2d:
    """A model whose receptive field is one pixel; of mid grey it thinks nothing."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, K, 1).eval()
    with torch.no_grad():
        model.bias.copy_(-model.weight.sum((1, 2, 3)) / 2)
    return model


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 60))
def test_windows_cover_an_axis_and_stay_on_it(length: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    begin = starts(length, window, stride)
    seen = {p for b in begin for p in range(b, b + window)}
    assert seen >= set(range(length))
    assert begin == sorted(set(begin))
    if length >= window:
        assert begin[-1] + window == length
        assert all(b % stride == 0 for b in begin[:-1])
    else:
        assert begin == [0]


def test_mmsegmentations_windows() -> None:
    """Crop 512, stride 341 on 683 and 512 pixels: two windows and one."""
    assert starts(683, 512, 341) == [0, 171]
    assert starts(512, 512, 341) == [0]
    assert starts(1024, 512, 341) == [0, 341, 512]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(1, 16))
def test_sliding_equals_the_whole_image_for_a_pointwise_model(
    height: int, width: int, window: int, stride: int
) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, K, 1)
    sliding = Sliding((window, window + 3), (min(stride, window), window), batch=3)
    one = image(height, width)
    with torch.no_grad():
        torch.testing.assert_close(sliding_logits(model, one, sliding), model(one[None])[0])


def test_overlapping_windows_are_averaged() -> None:
    """A model that says where in its window a pixel is: the mean over windows by hand."""

    def column(images: Tensor) -> Tensor:
        ramp = torch.arange(images.shape[-1]).float()
        return ramp.expand(len(images), 1, images.shape[-2], -1)

    found = sliding_logits(column, image(4, 6), Sliding((4, 4), (2, 2)))[0, 0]
    assert found.tolist() == [0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3]


def test_around_a_small_image_the_model_sees_the_fill() -> None:
    seen: list[Tensor] = []

    def watch(images: Tensor) -> Tensor:
        seen.append(images)
        return images

    one = image(2, 3)
    found = sliding_logits(watch, one, Sliding((4, 4), (2, 2), fill=(0.1, 0.2, 0.3)))
    assert found.shape == (3, 2, 3)
    assert torch.equal(found, one)
    assert torch.equal(seen[0][0, :, :2, :3], one)
    for channel, value in enumerate((0.1, 0.2, 0.3)):
        assert (seen[0][0, channel, 2:] == value).all()
        assert (seen[0][0, channel, :, 3:] == value).all()


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.75), (2.0,)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_all_looks_agree_on_a_constant_model(
    scales: tuple[float, ...], flip: bool, window: int | None
) -> None:
    """Whatever the size, the mirror and the windows, class 3 stays class 3 everywhere."""

    def constant(images: Tensor) -> Tensor:
        level = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]).view(1, K, 1, 1)
        return level.expand(len(images), K, *images.shape[-2:])

    sliding = None if window is None else Sliding((window, window), (5, 5))
    found = predict_mask(constant, image(11, 17), (23, 31), Looks(sliding, scales, flip))
    assert torch.equal(found, torch.full((23, 31), 3))


def test_the_mirror_image_is_mirrored_back(pointwise: nn.Conv2d) -> None:
    """For a pointwise model both looks say the same of every pixel."""
    one = image(12, 20)
    plain = predict_mask(pointwise, one, (12, 20), Looks(None))
    both = predict_mask(pointwise, one, (12, 20), Looks(None, (1.0,), flip=True))
    assert torch.equal(plain, both)
    assert torch.equal(plain, pointwise(one[None])[0].argmax(0))
    assert len(plain.unique()) > 1


def test_probabilities_are_averaged_not_logits() -> None:
    """Two looks, one of them very sure: logits' mean and probabilities' mean disagree."""

    def moody(images: Tensor) -> Tensor:
        sure = float(images[0, 0, 0, 0]) < 0.5
        level = torch.tensor([0.0, -30.0] if sure else [0.0, 1.2])
        return level.view(1, 2, 1, 1).expand(1, 2, *images.shape[-2:])

    one = torch.zeros(3, 1, 2)
    one[:, :, 1] = 1.0  # mirrored, the first pixel is bright
    found = predict_mask(moody, one, (1, 2), Looks(None, (1.0,), flip=True))
    chance = (torch.tensor([0.0, -30.0]).softmax(0) + torch.tensor([0.0, 1.2]).softmax(0)) / 2
    assert found.unique().tolist() == [int(chance.argmax())] == [0]


def test_many_classes_in_parts_equal_one_argmax() -> None:
    maps = torch.randn(150, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = nn.functional.interpolate(maps[None], (13, 9), mode="bilinear")[0].argmax(0)
    assert torch.equal(largest(maps, (13, 9)), whole)
