"""Paired differences: the bootstrap against a brute-force one, coverage, and the verdict."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from featdistill.evaluation.paired import Paired, paired, verdict


def runs(
    rng: np.random.Generator, seeds: int, images: int, *, seed_spread: float, lift: float = 0.1
) -> tuple[np.ndarray, np.ndarray, float]:
    """Hits of two models that share what makes an image hard; and the true difference.

    An image is classified rightly if ability + how easy it is + noise > 0, all of them normal.
    """
    easy = rng.normal(0, 1, images)
    abilities = (0.8 + lift, 0.8)

    def hits(ability: float) -> np.ndarray:
        of_seed = ability + rng.normal(0, seed_spread, (seeds, 1))
        return of_seed + easy + rng.normal(0, 0.5, (seeds, images)) > 0

    scale = math.sqrt(1 + 0.25 + seed_spread**2)
    share = [0.5 * (1 + math.erf(a / scale / math.sqrt(2))) for a in abilities]
    return hits(abilities[0]), hits(abilities[1]), share[0] - share[1]


def test_resampling_values_is_resampling_images() -> None:
    one, two, _ = runs(np.random.default_rng(0), 3, 1000, seed_spread=0.05)
    found = paired(one, two, resamples=20_000)
    rng, each = np.random.default_rng(1), one.mean(0) - two.mean(0)
    brute = [each[rng.integers(0, 1000, 1000)].mean() for _ in range(8000)]
    low, high = np.percentile(brute, [2.5, 97.5])
    assert found.images == pytest.approx((low, high), abs=8e-4)
    assert high - low > 10 * 8e-4
    assert found.mean == pytest.approx(one.mean() - two.mean())


def test_one_seed_is_the_binomial_closed_form() -> None:
    one, two = np.ones((1, 4000), bool), np.zeros((1, 4000), bool)
    two[:, :3000] = True  # a difference on a quarter of the images
    found = paired(one, two)
    reach = 1.96 * math.sqrt(0.25 * 0.75 / 4000)
    assert found.images == pytest.approx((0.25 - reach, 0.25 + reach), abs=7e-4)
    assert (found.interval, found.std) == (None, None)


def test_seeds_add_by_students_t() -> None:
    """Where images never differ between resamples, the interval is t's own: 4.30 of two degrees."""
    images, seeds = 1000, 3
    one, two = np.zeros((2, seeds, images), bool)
    for place, share in enumerate((0.10, 0.14, 0.18)):  # the same share, of an image each its own
        one[place, : int(share * images)] = True
    found = paired(one, two, resamples=200_000)
    assert found.interval is not None
    low, high = found.interval
    error = 0.04 / math.sqrt(3)
    rest = 1.96 * math.sqrt(0.14 * 0.86 / images)
    assert (high - low) / 2 == pytest.approx(math.hypot(4.303 * error, rest), rel=0.05)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_spread", [0.0, 0.1])
def test_the_interval_covers_the_truth(seeds: int, seed_spread: float) -> None:
    rng, tries = np.random.default_rng(seeds), 300
    covered = {"interval": 0, "images": 0}
    for _ in range(tries):
        one, two, truth = runs(rng, seeds, 400, seed_spread=seed_spread)
        found = paired(one, two, resamples=1000)
        assert found.interval is not None
        covered["interval"] += found.interval[0] <= truth <= found.interval[1]
        covered["images"] += found.images[0] <= truth <= found.images[1]
    assert covered["interval"] / tries >= 0.92  # 0.95 but for the chance of 300 tries
    if seed_spread:  # what images alone would claim: this check can fail
        assert covered["images"] / tries < 0.85
    else:
        assert 0.90 <= covered["images"] / tries <= 0.99


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 30)).flatmap(
        lambda shape: st.tuples(arrays.arrays(bool, shape), arrays.arrays(bool, shape))
    ),
    st.randoms(use_true_random=False),
)
def test_intervals_nest_and_order_does_not_matter(
    tables: tuple[np.ndarray, np.ndarray], random: object
) -> None:
    one, two = tables
    found = paired(one, two, resamples=200)
    if found.interval is not None:
        assert found.interval[0] <= found.images[0] <= found.images[1] <= found.interval[1]
    assert -1 <= found.images[0] <= found.images[1] <= 1
    order = list(range(one.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = paired(one[:, order], two[:, order], resamples=200)
    assert shuffled.images == pytest.approx(found.images)
    if found.interval is not None:
        assert shuffled.interval == pytest.approx(found.interval)


def test_the_images_part_leaves_out_what_seeds_disagree_on() -> None:
    """Against the two-way table's mean squares, computed entry by entry."""
    from featdistill.evaluation import paired as module

    one, two, _ = runs(np.random.default_rng(4), 4, 50, seed_spread=0.2, lift=1.5)
    table = one.astype(int) - two.astype(int)
    of_image, of_seed, mean = table.mean(0), table.mean(1), table.mean()
    rest = table - of_image - of_seed[:, None] + mean
    rest_square = (rest**2).sum() / (3 * 49)
    image_square = 4 * ((of_image - mean) ** 2).sum() / 49
    expected = math.sqrt(max(1 - rest_square / image_square, 0))
    assert module._shared(table.astype(np.int8)) == pytest.approx(expected)
    assert 0 < expected < 1


def test_a_whole_test_set_costs_little_memory() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.random((2, 3, 50_000)) < 0.8
    tracemalloc.start()
    paired(one, two, resamples=10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # all resamples of all images would be 2 GB


def said(per_seed: tuple[float, ...], interval: tuple[float, float] | None) -> str:
    return verdict(Paired(per_seed, (-0.0004, 0.02), interval))


def test_verdict_says_no_more_than_the_interval() -> None:
    assert said((0.02, 0.02, 0.02), (0.004, 0.036)) == (
        "Fine-tuned, the distilled student is better than its teacher by 2.0 points of top-1 "
        "(95% interval +0.4 to +3.6; better under 3 of 3 seeds)."
    )
    assert "is worse than its teacher by 2.0" in said((-0.02,) * 3, (-0.03, -0.001))
    tie = said((0.03, -0.02, 0.01), (-0.02, 0.04))
    assert "cannot be told apart: +0.7 points of top-1 for the student" in tie
    assert "better under 2 of 3 seeds" in tie
    one = said((0.03,), None)
    assert "single seed" in one
    assert "3.0 points of top-1 above its teacher" in one
    assert "0.0 to +2.0" in one
    assert "-0.0" not in one
