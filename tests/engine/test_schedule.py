"""The learning rate at each step, in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featdistill.engine.schedule import Schedule, build_schedule, scaled_rate


def test_warmup_is_a_line() -> None:
    schedule = Schedule(steps=100, warmup=10, peak=1.0, start=0.1, final=0.01)
    assert [schedule.rate(s) for s in range(11)] == pytest.approx(
        [0.1 + 0.09 * s for s in range(11)]
    )


def test_cosine_has_its_ends_and_its_middle() -> None:
    schedule = Schedule(steps=110, warmup=10, peak=1.0, start=0.0, final=0.2)
    assert schedule.rate(10) == pytest.approx(1.0)
    assert schedule.rate(60) == pytest.approx(0.6)
    assert schedule.rate(35) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))
    assert schedule.rate(110) == pytest.approx(0.2)
    assert schedule.rate(109) == pytest.approx(0.2, abs=1e-3)


def test_a_polynomial_has_its_ends_and_its_middle() -> None:
    """mmsegmentation's `poly`: (1 - progress) ** power, from the peak to the last rate."""
    line = Schedule(steps=110, warmup=10, peak=1.0, start=0.0, final=0.2, power=1.0)
    assert [line.rate(s) for s in (5, 10, 60, 110)] == pytest.approx([0.5, 1.0, 0.6, 0.2])
    bent = Schedule(steps=110, warmup=10, peak=1.0, start=0.0, final=0.0, power=0.9)
    assert bent.rate(85) == pytest.approx(0.25**0.9)
    assert bent.rate(60, scale=0.1) == pytest.approx(0.1 * 0.5**0.9)


@given(
    steps=st.integers(1, 500),
    warmup=st.floats(0, 0.999),
    peak=st.floats(1e-6, 10),
    start=st.floats(0, 1),
    final=st.floats(0, 1),
    power=st.sampled_from([None, 0.9, 1.0, 2.0]),
)
@settings(derandomize=True, deadline=None)
def test_rises_then_falls_between_its_ends(
    steps: int, warmup: float, peak: float, start: float, final: float, power: float | None
) -> None:
    schedule = build_schedule(
        per_epoch=7,
        epochs=None,
        steps=steps,
        peak=peak,
        warmup=warmup,
        start_ratio=start,
        final_ratio=final,
        power=power,
    )
    rates = [schedule.rate(s) for s in range(steps)]
    top, slack = schedule.warmup, 1e-12 * peak
    assert 0 <= top <= steps
    assert min(rates) >= min(start, final) * peak - slack
    assert max(rates) <= peak + slack
    assert all(a <= b + slack for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b - slack for a, b in pairwise(rates[top:]))


def test_epochs_or_steps() -> None:
    ratios = {"peak": 2.0, "warmup": 0.1, "start_ratio": 0.25, "final_ratio": 0.5}
    by_epochs = build_schedule(per_epoch=30, epochs=1.5, steps=None, **ratios)
    assert by_epochs == Schedule(steps=45, warmup=4, peak=2.0, start=0.5, final=1.0)
    assert build_schedule(per_epoch=30, epochs=None, steps=45, **ratios) == by_epochs
    assert build_schedule(per_epoch=30, epochs=1e-6, steps=None, **ratios).steps == 1


def test_linear_rule() -> None:
    """The paper's 1.2e-3 at a batch of 2048 is 3e-4 per 512."""
    assert scaled_rate(None, 3e-4, 2048) == pytest.approx(1.2e-3)
    assert scaled_rate(0.5, 3e-4, 2048) == 0.5
