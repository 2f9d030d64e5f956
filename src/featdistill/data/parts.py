"""The parts of a data set, and the names by which they and their classes go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from featdistill.core.errors import DataError
from featdistill.data.sources import Relabelled, Source

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


def numbered_as(train: Source, source: Source) -> Source:
    """The source with its labels numbered as the training part numbers them.

    Raises:
        DataError: it has classes that the training part lacks.
    """
    if source.classes is None or train.classes is None or source.labels is None:
        return source
    if source.classes == train.classes:
        return source
    strangers = sorted(set(source.classes) - set(train.classes))
    if strangers:
        lacks = sorted(set(train.classes) - set(source.classes))
        raise DataError(
            f"'{source.name}' has classes that '{train.name}' lacks: {some(strangers)}"
            + (f"; and lacks: {some(lacks)}" if lacks else ""),
            expected="the same classes in both",
        )
    number = {name: i for i, name in enumerate(train.classes)}
    table = np.array([number[name] for name in source.classes], dtype=np.int64)
    return Relabelled(source, table[source.labels], train.classes)


def own_classes(source: Source) -> tuple[str, ...]:
    """The class names that labelled images came with, before `numbered_as` gave them others."""
    source = source.source if isinstance(source, Relabelled) else source
    assert source.classes is not None
    return source.classes
