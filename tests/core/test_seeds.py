"""Randomness is a pure function of its keys."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featdistill.core import seeds
from featdistill.core.seeds import (
    SampleStream,
    generator,
    key,
    seeded_globals,
    streams,
    torch_generator,
    uniforms,
)

keys = st.integers(0, 2**64 - 1)


def test_key_is_the_same_on_every_machine() -> None:
    assert key(0, "order", 3) == 7497908583133902551


@pytest.mark.parametrize(
    ("one", "other"),
    [((1, 2), (2, 1)), ((1,), ("1",)), ((12,), (1, 2)), (("ab",), ("a", "b")), ((0,), (0, 0))],
)
def test_key_tells_parts_apart(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert key(*one) != key(*other)


def test_generators_are_pinned_and_their_own() -> None:
    assert generator("a", 1).integers(1000, size=3).tolist() == [289, 435, 532]
    assert torch.equal(
        torch.rand(4, generator=torch_generator("a")), torch.rand(4, generator=torch_generator("a"))
    )
    assert not np.array_equal(generator("a").random(4), generator("b").random(4))


@given(base=keys, rows=st.integers(1, 5), columns=st.integers(2, 30), data=st.data())
def test_uniforms_depend_on_their_own_coordinates_only(
    base: int, rows: int, columns: int, data: st.DataObject
) -> None:
    positions = np.arange(columns)
    whole = uniforms(base, np.arange(rows)[:, None], positions[None, :])
    chosen = np.array(
        data.draw(st.lists(st.sampled_from(positions.tolist()), min_size=1)), dtype=np.int64
    )
    row = data.draw(st.integers(0, rows - 1))
    assert whole.shape == (rows, columns)
    assert ((whole >= 0) & (whole < 1)).all()
    np.testing.assert_array_equal(uniforms(base, np.array(row), chosen), whole[row, chosen])


@pytest.mark.parametrize("base", [0, 1, 2**64 - 1, key(0, "mixup", 7)])
def test_uniforms_look_uniform(base: int) -> None:
    n = 200_000
    u = uniforms(base, np.arange(400)[:, None], np.arange(n // 400)[None, :])
    five_sigma = 5 / np.sqrt(12 * n)
    assert abs(u.mean() - 1 / 2) < five_sigma
    assert abs(u.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / n)  # Var of (u - 1/2)^2 is 1/180
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    chi2 = ((counts - n / 100) ** 2 / (n / 100)).sum()
    assert abs(chi2 - 99) < 5 * np.sqrt(2 * 99)
    for neighbours in (np.corrcoef(u[:, 1:].ravel(), u[:, :-1].ravel()), np.corrcoef(u[:2])):
        assert abs(neighbours[0, 1]) < 5 / np.sqrt(400)


def test_uniforms_are_pinned() -> None:
    np.testing.assert_allclose(
        uniforms(0, np.arange(3)), [0.70121211, 0.94356423, 0.08471148], atol=1e-8
    )


def test_seeded_globals_seed_all_three_and_put_them_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state().clone()
    with seeded_globals("a", 1):
        first = draw()
    with seeded_globals("a", 1):
        again = draw()
    with seeded_globals("a", 2):
        other = draw()
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_seeded_globals_put_back_after_an_error() -> None:
    before = torch.get_rng_state().clone(), random.getstate()

    def fail() -> None:
        with seeded_globals(0):
            torch.rand(3), random.random()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_stream_draws_by_position_in_the_global_batch() -> None:
    whole = SampleStream(3, 5, torch.arange(8))
    half = SampleStream(3, 5, torch.arange(4, 8))
    assert torch.equal(half.uniforms("drop", rows=2), whole.uniforms("drop", rows=2)[:, 4:])
    assert half.sample_generator("erase", 1).random() == whole.sample_generator("erase", 5).random()
    assert half.batch_generator("mix").random() == whole.batch_generator("mix").random()


@pytest.mark.parametrize(
    "other", [SampleStream(4, 5, torch.arange(8)), SampleStream(3, 6, torch.arange(8))]
)
def test_a_stream_differs_by_seed_and_step(other: SampleStream) -> None:
    stream = SampleStream(3, 5, torch.arange(8))
    assert not torch.equal(stream.uniforms("drop"), other.uniforms("drop"))
    assert not torch.equal(stream.uniforms("drop"), stream.uniforms("mask"))
    assert stream.uniforms("drop").dtype == torch.float32


def test_many_keys_are_single_ones() -> None:
    found = seeds.keys("crop", 3, -1, last=[0, 7, 10**12])
    assert found.dtype == np.uint64
    assert found.tolist() == [key("crop", 3, -1, n) for n in (0, 7, 10**12)]


@given(st.lists(keys, min_size=1, max_size=5), st.integers(1, 4))
def test_streams_are_numpy_s_philox(many: list[int], blocks: int) -> None:
    found = streams(np.array(many, dtype=np.uint64), blocks)
    assert found.shape == (len(many), 4 * blocks)
    for row, one in zip(found, many, strict=True):
        assert row.tolist() == np.random.Philox(key=one).random_raw(4 * blocks).tolist()
