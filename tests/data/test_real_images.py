"""Real images, where a developer has them beside the checkout; skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from featdistill.data.open import open_data
from featdistill.data.views import CropView, EvalView


def test_cifar_in_parquet(real_data: Path) -> None:
    data = open_data(str(real_data / "cifar10"))
    assert (len(data.train), len(data.held_out or ())) == (50_000, 10_000)
    assert data.train.classes is not None
    assert data.train.classes[:2] == ("airplane", "automobile")
    assert data.train.read(49_999).shape == (3, 32, 32)


def test_photographs_in_class_folders(real_data: Path) -> None:
    data = open_data(str(real_data / "imagenet-sample"))
    assert (len(data.train), len(data.train.classes or ())) == (200, 200)
    for index in (0, 77, 199):
        image = data.train.read(index)
        assert CropView(224)(image, (0, 0, index))[0].shape == (3, 224, 224)
        assert EvalView(224)(image)[0].shape == (3, 224, 224)


@pytest.mark.parametrize("part", ["training", "validation"])
def test_street_scenes_without_labels(real_data: Path, part: str) -> None:
    source = open_data(str(real_data / "camvid/images" / part)).train
    assert source.labels is None
    assert source.read(0).shape == (3, 360, 480)
