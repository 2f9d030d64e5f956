"""PCA pictures: known components, stable signs, the thing in the middle."""

from __future__ import annotations

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from featdistill.diagnostics.pca import pca_pictures


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_components_are_scikit_learns() -> None:
    maps = _random(3, 6, 4, 5) * torch.tensor([9.0, 5, 3, 1, 1, 1]).view(1, 6, 1, 1)
    found = pca_pictures(maps)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    pca = PCA(3).fit(rows)
    scores = torch.from_numpy(pca.transform(rows))
    torch.testing.assert_close(found.explained, torch.from_numpy(pca.explained_variance_ratio_))
    for i in range(3):
        # inside of the range colours are an affine function of the scores, up to sign
        colours = found.colours.reshape(-1, 3)[:, i]
        inside = (colours > 0) & (colours < 1)
        both = torch.stack([colours[inside], scores[inside, i]])
        assert abs(float(torch.corrcoef(both)[0, 1])) == pytest.approx(1, abs=1e-9)


def test_the_same_whatever_rotation_of_space() -> None:
    """Up to sign: shapes do not depend on the channels' axes."""
    maps = _random(2, 5, 4, 4) * torch.tensor([9.0, 4, 2, 1, 1]).view(1, 5, 1, 1)
    turn = torch.linalg.qr(_random(5, 5)).Q
    one = pca_pictures(maps).colours
    two = pca_pictures(torch.einsum("dc,nchw->ndhw", turn, maps)).colours
    for i in range(3):
        same = torch.allclose(one[..., i], two[..., i], atol=1e-6)
        flipped = torch.allclose(one[..., i], 1 - two[..., i], atol=1e-6)
        assert same or flipped


def test_scales_are_shared_by_the_images() -> None:
    maps = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    maps[1, 0] = 1.0  # all of the variance is between the two images
    found = pca_pictures(maps)
    assert found.explained.tolist() == pytest.approx([1, 0, 0])
    assert found.colours[0, ..., 0].unique().tolist() == [0]
    assert found.colours[1, ..., 0].unique().tolist() == [1]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_foreground_is_the_thing_in_the_middle(sign: float) -> None:
    maps = 0.01 * _random(2, 8, 6, 6)
    maps[:, 0, 2:4, 1:5] += 5.0 * sign
    found = pca_pictures(maps, foreground=True)
    expected = torch.zeros(2, 6, 6, dtype=torch.bool)
    expected[:, 2:4, 1:5] = True
    assert torch.equal(found.foreground, expected)
    assert (found.colours[~expected] == 1).all()


def test_few_channels_and_no_variance() -> None:
    found = pca_pictures(torch.ones(1, 2, 2, 2), foreground=True)
    assert found.foreground.all()
    assert found.explained.tolist() == [0, 0, 0]
    assert found.colours.isfinite().all()
