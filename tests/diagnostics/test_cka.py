"""Linear CKA against the estimator as it is printed, closed forms, and any way of streaming."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdistill.diagnostics.cka import LinearCKA, unbiased_hsic


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cka(*points: Tensor, block: int = 256) -> Tensor:
    measure = LinearCKA(len(points), block=block)
    measure.update(points)
    return measure.compute()


def _hsic_as_printed(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012, equation 5, term by term."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    one = torch.ones(n, dtype=torch.float64)
    first = torch.trace(k @ m)
    second = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (one @ k @ m @ one)
    return float((first + second - third) / (n * (n - 3)))


def test_hsic_is_the_printed_one() -> None:
    x, y = _random(9, 5), _random(9, 7, seed=1) + 3
    found = unbiased_hsic([x, y])
    for i, one in enumerate((x, y)):
        for j, two in enumerate((x, y)):
            assert float(found[i, j]) == pytest.approx(_hsic_as_printed(one, two), rel=1e-10)


def test_hsic_is_unbiased() -> None:
    """Of independent features its mean is 0: what the usual, biased one is far from."""
    found = [
        float(unbiased_hsic([_random(8, 4, seed=i), _random(8, 4, seed=-i - 1)])[0, 1])
        for i in range(400)
    ]
    mean = sum(found) / len(found)
    error = torch.tensor(found).std().item() / math.sqrt(len(found))
    assert abs(mean) < 4 * error
    assert error < 0.1


@pytest.mark.parametrize("block", [16, 256])
def test_rotation_shift_and_scale_change_nothing(block: int) -> None:
    x = _random(64, 12)
    turn = torch.linalg.qr(_random(12, 12, seed=1)).Q
    found = _cka(x, x @ turn, 7 * x, x - 100, torch.cat([x, torch.zeros(64, 3)], 1), block=block)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-9)


def test_a_linear_map_that_is_no_rotation_does() -> None:
    x = _random(64, 12)
    assert _cka(x, x * torch.logspace(0, 3, 12))[0, 1] < 0.9


def test_independent_features_give_zero() -> None:
    found = _cka(_random(2048, 32), _random(2048, 32, seed=1))
    assert abs(float(found[0, 1])) < 0.02
    assert float(found[0, 0]) == pytest.approx(1)


def test_known_mixture() -> None:
    """Of [u, v] and [u, w], u, v and w independent and alike, one half is shared."""
    u, v, w = (_random(4096, 16, seed=i) for i in range(3))
    found = _cka(torch.cat([u, v], 1), torch.cat([u, w], 1))
    assert float(found[0, 1]) == pytest.approx(0.5, abs=0.02)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    order=st.randoms(use_true_random=False),
)
def test_neither_batches_nor_order_nor_merging_matter(
    sizes: list[int], cut: int, order: object
) -> None:
    n = max(sum(sizes), 8)
    x, y = _random(n, 6), _random(n, 4, seed=1)
    places = list(range(n))
    order.shuffle(places)  # type: ignore[attr-defined]
    whole = LinearCKA(2, block=16)
    whole.update([x, y])
    halves = LinearCKA(2, block=16), LinearCKA(2, block=16)
    start = 0
    for number, size in enumerate([*sizes, n]):
        some = places[start : start + size]
        start += size
        if some:
            halves[number < cut].update([x[some], y[some]], some)
    halves[0].merge(halves[1])
    assert halves[0].count == whole.count
    torch.testing.assert_close(halves[0].compute(), whole.compute(), rtol=1e-9, atol=1e-12)


def test_blocks_are_averaged_before_the_ratio() -> None:
    x, y = _random(32, 6), _random(32, 6, seed=1)
    hsic = (unbiased_hsic([x[:16], y[:16]]) + unbiased_hsic([x[16:], y[16:]])) / 2
    expected = hsic[0, 1] / (hsic[0, 0] * hsic[1, 1]).sqrt()
    torch.testing.assert_close(_cka(x, y, block=16)[0, 1], expected)


def test_an_incomplete_block_counts_by_its_images() -> None:
    x, y = _random(24, 6), _random(24, 6, seed=1)
    hsic = (16 * unbiased_hsic([x[:16], y[:16]]) + 8 * unbiased_hsic([x[16:], y[16:]])) / 24
    expected = hsic[0, 1] / (hsic[0, 0] * hsic[1, 1]).sqrt()
    torch.testing.assert_close(_cka(x, y, block=16)[0, 1], expected)


def test_what_does_not_vary_has_no_cka() -> None:
    found = _cka(_random(16, 3), torch.full((16, 3), 0.1))
    assert found.isnan().tolist() == [[False, True], [True, True]]
    assert _cka(_random(3, 3)).isnan().all()


def test_complete_blocks_do_not_stay_in_memory() -> None:
    measure = LinearCKA(1, block=8)
    for _ in range(5):
        measure.update([_random(10, 2)])
    assert measure.count == 48  # 50 less an incomplete block of 2
    assert sum(map(len, measure._waiting.values())) == 2
