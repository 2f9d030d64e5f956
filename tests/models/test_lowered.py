"""A teacher whose weights are kept in bf16 says what it says under autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from model_zoo import images, small, small_beit, small_swin, small_vit
from torch import Tensor

from featdistill.models.backbone import Backbone, TimmBuild
from featdistill.models.lowered import lay_out_convolutions, lower_weights
from featdistill.models.students import build_fresh


def convolutional(name: str) -> Backbone:
    return build_fresh(TimmBuild(name, {"num_classes": 0}), spec=name, image_size=64).eval()


MAKERS = {
    "vit": lambda: (small_vit(), 32),
    "beit": lambda: (small_beit(), 32),
    "swin": lambda: (small_swin(), 32),
    "swin-v1": lambda: (small("swin_tiny_patch4_window7_224"), 32),
    "resnet": lambda: (convolutional("resnet10t"), 64),
    "convnext": lambda: (convolutional("convnext_atto"), 64),
}


@torch.no_grad()
def seen(backbone: Backbone, x: Tensor, *, low: bool = True) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        return backbone(x).map.float()


@pytest.mark.parametrize("name", MAKERS)
def test_the_numbers_are_autocasts_own(name: str) -> None:
    backbone, side = MAKERS[name]()
    backbone.requires_grad_(False)
    x, before = images(2, side), backbone.state_dict()
    expected = seen(backbone, x)
    low = copy.deepcopy(backbone)
    lower_weights(low)
    assert torch.equal(seen(low, x), expected)
    lower_weights(low)
    assert torch.equal(seen(low, x), expected)
    kinds = {t.dtype for t in low.state_dict().values()}
    assert torch.bfloat16 in kinds
    assert low.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_targets_hardly_move(name: str) -> None:
    """The map in bf16 is within 2 % of that in float32, and points where it points."""
    backbone, side = MAKERS[name]()
    backbone.requires_grad_(False)
    x = images(4, side)
    true = seen(backbone, x, low=False)
    lower_weights(backbone)
    found = seen(backbone, x)
    assert float((found - true).norm() / true.norm()) < 0.02
    assert float(torch.cosine_similarity(found, true, dim=1).mean()) > 0.9995


def test_only_what_is_frozen_is_lowered() -> None:
    with pytest.raises(AssertionError, match="frozen"):
        lower_weights(small_vit())


@pytest.mark.parametrize(("name", "last"), [("resnet", True), ("convnext", True), ("vit", False)])
def test_convolutions_are_laid_out_channels_last_and_say_the_same(name: str, last: bool) -> None:
    backbone, side = MAKERS[name]()
    x = images(2, side)
    expected = seen(backbone, x, low=False)
    lay_out_convolutions(backbone.model)
    torch.testing.assert_close(seen(backbone, x, low=False), expected, rtol=1e-4, atol=1e-4)
    weights = [p for p in backbone.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert any(p.is_contiguous(memory_format=torch.channels_last) for p in weights) is last
