"""The parts of a data set, and the names by which they and their classes go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from featdistill.data.sources import Source

T = TypeVar("T")

TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "dev")
TEST = ("test", "testing")


@dataclass(frozen=True)
class Data:
    """The parts of a data set; `train` is everything where there are no parts."""

    train: Source
    val: Source | None = None
    test: Source | None = None

    @property
    def held_out(self) -> Source | None:
        """What scores are measured on: the validation part, or else the test part."""
        return self.val if self.val is not None else self.test


def first(parts: Mapping[str, T], names: Sequence[str]) -> T | None:
    """The first of several names that a mapping has."""
    return next((parts[name] for name in names if name in parts), None)


def some(names: Sequence[str], limit: int = 5) -> str:
    """A few of many names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def class_names(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct names in order; in the order of their numbers, if they are numbers."""
    unique = set(names)
    numeric = all(name.lstrip("-").isdigit() for name in unique)
    return tuple(sorted(unique, key=int if numeric else str))
