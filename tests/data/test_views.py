"""Views: boxes inside their limits, and nothing drawn from anywhere but the address."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from featdistill.core.errors import DataError
from featdistill.core.seeds import generator
from featdistill.data.views import (
    ContrastiveView,
    CropView,
    EvalView,
    FinetuneView,
    View,
    random_box,
)

RATIO = (3 / 4, 4 / 3)


@pytest.fixture(scope="module")
def image() -> Tensor:
    """A colourful, smooth 60 x 80 picture without symmetry."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 60), torch.linspace(0, 1, 80), indexing="ij")
    layers = torch.stack([x, y**2, (x * 3 + y).sin().abs()])
    return (layers * 255).to(torch.uint8)


def finetune(randaugment: str | None = "rand-m9-mstd0.5-inc1") -> FinetuneView:
    return FinetuneView(
        size=24,
        scale=(0.08, 1),
        ratio=RATIO,
        flip=True,
        randaugment=randaugment,
        mean=(0.5, 0.4, 0.3),
    )


VIEWS: dict[str, Any] = {
    "crop": CropView(24),
    "finetune": finetune(),
    "contrastive": ContrastiveView(24, rotate=15, blur=0.5),
}


@given(
    seed=st.integers(0, 2**32),
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    low=st.floats(0.01, 1),
    spread=st.floats(0, 1),
    aspect=st.floats(0.5, 1),
    stretch=st.floats(1, 3),
)
@settings(derandomize=True, deadline=None)
def test_boxes_are_inside_image_and_limits(
    seed: int,
    height: int,
    width: int,
    low: float,
    spread: float,
    aspect: float,
    stretch: float,
) -> None:
    scale, ratio = (low, low + spread * (1 - low)), (aspect, aspect * stretch)
    box = random_box(generator(seed), height, width, scale, ratio)
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width
    # sides are rounded to whole pixels, which moves the aspect of a small box
    low_aspect = (box.width - 0.51) / (box.height + 0.51)
    high_aspect = (box.width + 0.51) / max(box.height - 0.51, 1e-9)
    assert high_aspect >= ratio[0]
    assert low_aspect <= ratio[1]
    assert (box.width - 0.51) * (box.height - 0.51) <= scale[1] * height * width or (
        box.height == height or box.width == width  # the fallback
    )


def test_the_fallback_is_the_largest_central_box() -> None:
    assert random_box(generator(0), 10, 1000, (0.9, 1), RATIO) == random_box(
        generator(1), 10, 1000, (0.9, 1), RATIO
    )
    box = random_box(generator(0), 10, 1000, (0.9, 1), RATIO)
    assert (box.top, box.left, box.height, box.width) == (0, 493, 10, 13)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 0.6)])
def test_boxes_are_distributed_as_torchvisions(scale: tuple[float, float]) -> None:
    n, height, width = 4000, 100, 140
    reference = RandomResizedCrop(8, scale=scale, ratio=RATIO, antialias=True)
    canvas = [torch.empty(3, height, width)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [reference.make_params(canvas) for _ in range(n)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    boxes = [random_box(generator(0, i), height, width, scale, RATIO) for i in range(n)]
    ours = np.array([[b.top, b.left, b.height, b.width] for b in boxes])

    def statistics(boxes: np.ndarray) -> np.ndarray:
        top, left, h, w = boxes.T.astype(float)
        area, aspect = h * w / (height * width), np.log(w / h)
        return np.stack([area, area**2, aspect, aspect**2, top + h / 2, left + w / 2])

    a, b = statistics(ours), statistics(theirs)
    error = np.sqrt((a.var(1) + b.var(1)) / n)
    assert (np.abs(a.mean(1) - b.mean(1)) < 4 * error).all()


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_a_pure_function_of_its_address(image: Tensor, name: str) -> None:
    view: View = VIEWS[name]
    before = image.clone()
    first = view(image, (1, 2, 3))
    torch.rand(3), np.random.rand(), random.random()
    view(image, (1, 2, 4))
    again = view(image, (1, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(image, before), "the image is not written to"
    for v in first:
        assert v.shape == (3, 24, 24)
        assert v.dtype == torch.uint8


@pytest.mark.parametrize("name", VIEWS)
def test_every_part_of_the_address_matters(image: Tensor, name: str) -> None:
    view: View = VIEWS[name]
    (first, *_) = view(image, (1, 2, 3))
    for address in [(0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3)]:
        assert not torch.equal(view(image, address)[0], first), address


@pytest.mark.parametrize("name", VIEWS)
def test_global_generators_are_left_alone(image: Tensor, name: str) -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for index in range(5):
        VIEWS[name](image, (0, 0, index))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_half_of_the_crops_are_mirrored() -> None:
    ramp = torch.arange(0, 250, 5, dtype=torch.uint8).expand(3, 50, 50)
    view = CropView(8, scale=(0.9, 1))
    mirrored = [bool(v[0, 0, 0] > v[0, 0, -1]) for i in range(400) for v in view(ramp, (0, 0, i))]
    assert abs(np.mean(mirrored) - 0.5) < 4 * 0.5 / np.sqrt(400)
    never = CropView(8, flip=False)
    assert all(v[0, 0, 0] < v[0, 0, -1] for i in range(50) for v in never(ramp, (0, 0, i)))


def test_the_whole_image_at_its_own_size_is_itself(image: Tensor) -> None:
    square = image[:, :, :60]
    view = CropView(60, scale=(1, 1), ratio=(1, 1), flip=False)
    assert torch.equal(view(square, (0, 0, 0))[0], square)


def test_two_contrastive_views_differ(image: Tensor) -> None:
    one, two = VIEWS["contrastive"](image, (0, 0, 0))
    assert not torch.equal(one, two)


def test_contrastive_parts_can_be_left_out(image: Tensor) -> None:
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "gray": 0.0}
    plain = ContrastiveView(60, (1, 1), (1, 1), flip=False, **none)
    square = image[:, :, :60]
    assert all(torch.equal(v, square) for v in plain(square, (0, 0, 0)))


@pytest.mark.parametrize("part", ["brightness", "contrast", "saturation", "hue"])
def test_each_part_of_the_jitter_acts(image: Tensor, part: str) -> None:
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "gray": 0.0}
    view = ContrastiveView(60, (1, 1), (1, 1), flip=False, **{**none, part: 0.4})
    square = image[:, :, :60]
    changed = [not torch.equal(v, square) for i in range(25) for v in view(square, (0, 0, i))]
    assert 0.6 < sum(changed) / len(changed) < 0.95, "on 80 % of the views"


def test_a_grey_view_is_grey(image: Tensor) -> None:
    (one, _) = ContrastiveView(24, gray=1.0)(image, (0, 0, 0))
    assert torch.equal(one[0], one[1])
    assert torch.equal(one[0], one[2])


def test_randaugment_changes_the_crop(image: Tensor) -> None:
    changed = [
        not torch.equal(finetune()(image, (0, 0, i))[0], finetune(None)(image, (0, 0, i))[0])
        for i in range(20)
    ]
    assert sum(changed) > 10


def test_fill_is_the_mean_colour() -> None:
    """What a translation uncovers of a constant image is the given colour."""
    view = FinetuneView(
        size=20,
        scale=(1, 1),
        ratio=(1, 1),
        flip=False,
        randaugment="rand-m9-n1-tinc-translatexrel1",
        mean=(1.0, 0.0, 0.0),
    )
    found = {
        tuple(pixel)
        for i in range(40)
        for pixel in view(torch.zeros(3, 20, 20, dtype=torch.uint8), (0, 0, i))[0]
        .flatten(1)
        .T.tolist()
    }
    assert (255, 0, 0) in found


# scoring


@pytest.mark.parametrize("shape", [(3, 40, 40), (3, 31, 77), (3, 5, 3), (3, 1, 1)])
def test_eval_of_a_constant_is_that_constant(shape: tuple[int, ...]) -> None:
    (view,) = EvalView(16)(torch.full(shape, 77, dtype=torch.uint8), (0, 0, 0))
    assert view.shape == (3, 16, 16)
    assert (view == 77).all()


def test_eval_is_the_central_crop() -> None:
    """At a cut as large as the view, the resize is the identity."""
    image = torch.arange(64 * 80, dtype=torch.int64).remainder(251).to(torch.uint8)
    image = image.view(1, 64, 80).expand(3, -1, -1)
    (view,) = EvalView(48, share=0.75)(image, (0, 0, 0))
    assert torch.equal(view, image[:, 8:56, 16:64])


def test_eval_of_a_ramp_is_the_ramp_of_the_middle() -> None:
    """A linear ramp resampled is linear: pixel i of the view looks at centre (i + 0.5) * cut."""
    ramp = (torch.arange(120) * 2).to(torch.uint8).expand(3, 120, 120)
    (view,) = EvalView(35, share=0.875)(ramp, (0, 0, 0))
    cut, first = 105, 7
    expected = 2 * (first + (torch.arange(35) + 0.5) * cut / 35 - 0.5)
    inner = slice(2, -2)  # at the border the filter is cut off
    assert (view[0, 3, inner].float() - expected[inner]).abs().max() <= 0.51


@pytest.mark.parametrize("share", [0.5, 0.875, 1.0])
def test_eval_does_not_look_at_the_address(image: Tensor, share: float) -> None:
    view = EvalView(24, share)
    assert torch.equal(view(image, (0, 0, 0))[0], view(image, (5, 6, 7))[0])


def test_strong_randaugment_never_breaks_an_image() -> None:
    """Among its draws are posterisations to 0 bits, which Pillow refuses since version 13."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 12, 12), np.uint8))
    view = FinetuneView(
        size=12, scale=(0.5, 1), ratio=(1, 1), flip=True, mean=(0.5, 0.5, 0.5),
        randaugment="rand-m10-mstd0.5-inc1",
    )  # fmt: skip
    for index in range(400):
        assert view(image, (0, 0, index))[0].shape == (3, 12, 12)


def test_randaugment_that_is_none() -> None:
    with pytest.raises(DataError, match="rand-m9"):
        FinetuneView(
            size=8, scale=(0.5, 1), ratio=(1, 1), flip=True, mean=(0, 0, 0), randaugment="strong"
        )
