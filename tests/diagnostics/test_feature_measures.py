"""Closed forms of the feature measures, an independent reference, and any way of streaming."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featdistill.diagnostics.features import (
    NORM_EDGES,
    EffectiveRank,
    FeatureVariance,
    FourierAmplitude,
    LayerMeasures,
    TokenNorms,
    diagonal_frequencies,
)


def _maps(n: int = 6, channels: int = 5, grid: tuple[int, int] = (8, 8), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, *grid, generator=generator, dtype=torch.float64)


def _measured(measure: Any, maps: Tensor) -> Any:
    measure.update(maps)
    return measure.compute()


def test_fourier_is_numpys_along_the_diagonal() -> None:
    maps = _maps()
    shifted = np.fft.fftshift(np.log(np.abs(np.fft.fft2(maps.numpy())) + 1e-6), axes=(-2, -1))
    # the shifted spectrum has its constant part in the middle and the fastest in the corner
    diagonal = np.stack([shifted[..., 4 - k, 4 - k] for k in range(5)], -1).mean((0, 1))
    found = _measured(FourierAmplitude((8, 8)), maps)
    np.testing.assert_allclose(found.relative, diagonal - diagonal[0], rtol=1e-10)
    np.testing.assert_allclose(found.frequency, np.linspace(0, 1, 5))


def test_fourier_of_a_point_is_flat() -> None:
    maps = torch.zeros(2, 3, 14, 14)
    maps[..., 4, 7] = 5.0
    found = _measured(FourierAmplitude((14, 14)), maps)
    torch.testing.assert_close(found.relative, torch.zeros(8, dtype=torch.float64))
    assert found.high == pytest.approx(0)


def test_fourier_tells_smooth_from_rough() -> None:
    smooth = _measured(FourierAmplitude((8, 8)), torch.ones(1, 1, 8, 8))
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    rough = _measured(FourierAmplitude((8, 8)), ((-1.0) ** (x + y))[None, None])
    expected = math.log(64 + 1e-6) - math.log(1e-6)
    assert smooth.high == pytest.approx(-expected, abs=1e-6)
    assert rough.high == pytest.approx(expected, abs=1e-6)


def test_fourier_does_not_mind_the_scale() -> None:
    one = _measured(FourierAmplitude((8, 8)), _maps())
    ten = _measured(FourierAmplitude((8, 8)), 10 * _maps())
    torch.testing.assert_close(one.relative, ten.relative, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((4, 4), [(0, 0), (1, 1), (2, 2)]),
        ((5, 5), [(0, 0), (1, 1), (2, 2)]),
        ((4, 8), [(0, 0), (1, 2), (2, 4)]),
        ((1, 9), [(0, 0)]),
    ],
)
def test_frequencies(grid: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    assert diagonal_frequencies(*grid) == expected


def test_outliers_are_counted() -> None:
    maps = torch.zeros(3, 4, 6, 6)
    maps[:, 0] = 2.0  # norm 2 everywhere
    maps[0, 1, 0, :5] = 10.0
    found = _measured(TokenNorms(), maps)
    assert found.outliers == pytest.approx(5 / 36 / 3)
    share = torch.tensor([5 / 36, 0, 0]).double()
    assert found.outliers_error == pytest.approx(float(share.std()) / math.sqrt(3))
    assert found.largest == pytest.approx((math.sqrt(104) / 2 + 2) / 3)
    assert found.median == pytest.approx(2.0, rel=0.06)
    assert found.mean == pytest.approx((103 * 2 + 5 * math.sqrt(104)) / 108)
    assert found.histogram.sum() == 108
    above = found.histogram[NORM_EDGES[1:] > 10]
    assert above.sum() == 5


@pytest.mark.parametrize(("size", "bin_"), [(0.0, 0), (1e9, -1)])
def test_norms_beyond_the_histogram_are_in_its_ends(size: float, bin_: int) -> None:
    found = _measured(TokenNorms(), torch.full((1, 1, 2, 2), size))
    assert found.histogram[bin_] == 4
    assert found.outliers == 0


def test_variance_within_and_between() -> None:
    maps = _maps(5, 3, (4, 6))
    found = _measured(FeatureVariance(3), maps)
    array = maps.numpy()
    assert found.spatial == pytest.approx(array.var(axis=(2, 3)).mean())
    assert found.between == pytest.approx(array.mean((2, 3)).var(axis=0, ddof=1).mean())
    constant = _measured(FeatureVariance(3), torch.full((4, 3, 2, 2), 1.5))
    assert (constant.spatial, constant.between) == (0, 0)
    assert math.isnan(_measured(FeatureVariance(3), maps[:1]).between)


def test_rank_counts_directions() -> None:
    maps = torch.zeros(6, 10, 2, 2)
    for image in range(6):
        maps[image, image % 3] = 1.0
    assert _measured(EffectiveRank(10), maps) == pytest.approx(3)


def _flat(result: Any) -> dict[str, Tensor]:
    """A result's numbers by name."""
    found = {}
    for name, part in asdict(result).items():
        for key, value in part.items() if isinstance(part, dict) else [("", part)]:
            found[f"{name}.{key}"] = torch.as_tensor(value, dtype=torch.float64)
    return found


def _by_batches(maps: Tensor, size: int) -> LayerMeasures:
    measure = LayerMeasures(maps.shape[1], (maps.shape[2], maps.shape[3]))
    for batch in maps.split(size):
        measure.update(batch)
    return measure


def _merged(maps: Tensor) -> LayerMeasures:
    one, two = _by_batches(maps[:4], 2), _by_batches(maps[4:], 3)
    one.merge(two)
    return one


@pytest.mark.parametrize("way", [lambda m: _by_batches(m, 1), lambda m: _by_batches(m, 4), _merged])
def test_neither_batches_nor_merging_matter(way: Callable[[Tensor], LayerMeasures]) -> None:
    maps = _maps(11, 5, (6, 4)) * torch.linspace(0.1, 4, 24).view(6, 4)
    whole = _flat(_by_batches(maps, 11).compute())
    for name, value in _flat(way(maps).compute()).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12, msg=name)
