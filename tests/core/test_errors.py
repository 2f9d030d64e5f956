"""A mistake in one line: what was given, what was expected, what to do."""

from __future__ import annotations

import pytest

from featdistill.core.errors import ConfigError, FeatDistillError, Interrupted, did_you_mean


def test_given_expected_fix() -> None:
    error = FeatDistillError("a batch of 3", expected="an even one", fix="give 4")
    assert str(error) == "a batch of 3; expected an even one; give 4"
    assert str(FeatDistillError("broken", fix="mend it")) == "broken; mend it"


def test_several_mistakes_are_several_lines() -> None:
    assert str(ConfigError(["a", "b"])).splitlines() == ["a", "b"]


def test_exit_status_of_a_signal() -> None:
    assert Interrupted("stopped", signal_number=15).exit_code == 143
    assert FeatDistillError("x").exit_code == 2


@pytest.mark.parametrize(
    ("name", "hint"), [("distil", "did you mean 'distill'?"), ("zzzz", None), ("", None)]
)
def test_suggestions(name: str, hint: str | None) -> None:
    assert did_you_mean(name, ["distill", "compare"]) == hint
