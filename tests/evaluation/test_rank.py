"""Effective rank against the paper's own formula on the whole matrix, and in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdistill.evaluation.rank import Moments, collapse, effective_rank


def moments(rows: Tensor, sizes: tuple[int, ...] = ()) -> Moments:
    found = Moments(rows.shape[1])
    for part in rows.split(list(sizes) or [len(rows)]):
        found.add(part)
    return found


def noise(n: int = 40, channels: int = 7, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, channels + 1) ** 1.5
    return torch.randn(n, channels, generator=draw) * scale + 3


def rankme(rows: Tensor) -> float:
    """Equations 1 and 2 of the paper, from a singular value decomposition of all rows."""
    s = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    p = s / s.sum() + 1e-12
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("centred", [False, True])
def test_streaming_equals_the_whole_matrix(centred: bool) -> None:
    rows = noise()
    whole = rows.double() - (rows.double().mean(0) if centred else 0)
    found = moments(rows, (1, 20, 13, 6)).singular_values(centred=centred)
    assert torch.allclose(found, torch.linalg.svdvals(whole), rtol=1e-9)
    assert effective_rank(found) == pytest.approx(rankme(whole), rel=1e-9)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_equally_strong_directions_count_each(k: int) -> None:
    assert effective_rank(torch.tensor([2.0] * k + [0.0] * (7 - k))) == pytest.approx(k)


def test_two_directions_in_closed_form() -> None:
    p = 0.9
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert effective_rank(torch.tensor([9.0, 1.0])) == pytest.approx(math.exp(entropy))


def test_equal_rows_have_rank_one_and_none_about_their_mean() -> None:
    found = moments(noise(1).expand(300, -1) * 1000)
    assert effective_rank(found.singular_values()) == 1.0
    assert effective_rank(found.singular_values(centred=True)) == 0.0


def test_rows_almost_equal_are_rank_one_however_many_directions_the_rest_has() -> None:
    rows = torch.full((300, 16), 5.0) + 1e-5 * torch.randn(300, 16)
    assert effective_rank(moments(rows).singular_values()) < 1.001
    assert effective_rank(moments(rows).singular_values(centred=True)) > 10


def test_nothing_and_no_numbers() -> None:
    assert effective_rank(Moments(4).singular_values(centred=True)) == 0.0
    rows = noise()
    rows[3, 2] = float("nan")
    assert math.isnan(effective_rank(moments(rows).singular_values()))


def test_processes_add_up() -> None:
    rows = noise()
    one, other = moments(rows[::2]), moments(rows[1::2])
    one.reduce(lambda sums: sums + other._products)
    assert one.count == 40
    assert torch.allclose(one.singular_values(), moments(rows).singular_values(), rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_neither_scale_nor_rotation_matters(seed: int, scale: float) -> None:
    rows = noise(seed=seed).double()
    turn = torch.linalg.qr(noise(7, 7, seed + 1).double()).Q
    expected = effective_rank(moments(rows).singular_values())
    assert 1 <= expected <= 7
    assert effective_rank(moments(scale * rows @ turn).singular_values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("history", "alarm"),
    [
        ([2.0], False),  # a fresh student
        ([2.0, 3.0, 9.0, 9.0], False),  # still low, but early
        ([2.0, 3.0, 9.0, 9.0, 9.0, 9.0], True),  # low when half of the ten evaluations are over
        ([2.0, 12.0, 9.0], True),  # was above a quarter of the teacher's
        ([2.0, 12.0, 10.0], False),  # exactly a quarter
        ([50.0, 12.0], True),  # below a quarter of its start
        ([50.0, 13.0], False),
        ([50.0, 13.0, 1.0], True),
    ],
    ids=str,
)
def test_when_the_alarm_rings(history: list[float], alarm: bool) -> None:
    found = collapse(history, 40.0, share=0.25, evaluations=10)
    assert (found is not None) == alarm
    assert collapse(history, 40.0, share=0.0, evaluations=10) is None


def test_the_alarm_names_both_ranks() -> None:
    assert collapse([2.0, 12.0, 9.0], 40.0, share=0.25, evaluations=10) == (
        "9.0, the teacher's is 40.0"
    )
    assert collapse([50.0, 1.0], 1.0, share=0.25, evaluations=10) == "1.0, it began with 50.0"
