"""What a user can do wrong, said in one line: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class FeatDistillError(Exception):
    """A mistake that the user can mend; the command line prints it in one line and exits with 2.

    Args:
        given: what was found, with the offending value.
        expected: what would have been right.
        fix: what to do about it, as an imperative.

    Attributes:
        said: whether another process of the run says it, so that this one need not.
    """

    exit_code = 2
    said = False

    def __init__(self, given: str, *, expected: str | None = None, fix: str | None = None) -> None:
        self.given, self.expected, self.fix = given, expected, fix
        parts = [given]
        if expected:
            parts.append(f"expected {expected}")
        if fix:
            parts.append(fix)
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        """For its way to another process, whatever a subclass's arguments are."""
        return _again, (type(self), self.args, self.__dict__)


def _again(
    kind: type[FeatDistillError], args: tuple[Any, ...], state: dict[str, Any]
) -> FeatDistillError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(FeatDistillError):
    """Several mistakes in the options or configuration files, reported together."""

    def __init__(self, problems: Sequence[str]) -> None:
        assert problems
        self.problems = tuple(problems)
        super().__init__(problems[0])

    def __str__(self) -> str:
        return "\n".join(self.problems)


class DataError(FeatDistillError):
    """Images or labels that cannot be used."""


class ModelError(FeatDistillError):
    """A model, checkpoint or combination of models that cannot be used."""


class RunError(FeatDistillError):
    """An output folder, checkpoint or device that cannot be used."""


class NonFiniteError(FeatDistillError):
    """The loss or a gradient stopped being a number; the weights were left as they were."""

    exit_code = 3


class Interrupted(FeatDistillError):
    """The run was asked to stop, and saved its state before it did."""

    def __init__(self, given: str, *, signal_number: int, fix: str | None = None) -> None:
        super().__init__(given, fix=fix)
        self.exit_code = 128 + signal_number


def nearest(name: str, candidates: Iterable[str], limit: int = 3) -> list[str]:
    """The candidates that a mistyped `name` most likely meant, best first."""
    return difflib.get_close_matches(name, list(candidates), n=limit, cutoff=0.6)


def did_you_mean(name: str, candidates: Iterable[str]) -> str | None:
    """`did you mean 'x'?` with the nearest candidates, or None where nothing is near."""
    close = nearest(name, candidates)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else None
