"""The classes of segmentation data: their names, and the values of a mask that stand for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from featdistill.core.errors import DataError, did_you_mean
from featdistill.data.masks import Numbering


@dataclass(frozen=True)
class Scheme:
    """What was said of the masks' values; None: what the layout says.

    Attributes:
        classes: how many, a file of names, or a known data set's name.
        first_class: the value of the first class.
        unlabelled: values that mean no class.
    """

    classes: str | None = None
    first_class: int | None = None
    unlabelled: tuple[int, ...] | None = None

    def numbering(
        self,
        root: Path | None,
        *,
        known: str | None,
        first_class: int,
        unlabelled: tuple[int, ...],
        values: tuple[int, ...] | None = None,
    ) -> tuple[tuple[str, ...], Numbering]:
        """The classes and the numbering, from what was said and what the layout says.

        Args:
            root: where a file of class names may lie.
            known: the layout's usual classes.
            values: of the known classes, where they do not simply follow each other.
        """
        names = class_names_of(self.classes, root, known)
        start = self.first_class if self.first_class is not None else first_class
        if values is not None and self.first_class is None and len(values) == len(names):
            numbers = values
        else:
            numbers = tuple(range(start, start + len(names)))
        nothing = self.unlabelled if self.unlabelled is not None else unlabelled
        both = sorted(set(numbers) & set(nothing))
        if both and self.unlabelled is not None:
            raise DataError(
                f"value {both[0]} would be the class '{names[numbers.index(both[0])]}' and "
                "unlabelled",
                fix="change --data.first_class or --data.unlabelled",
            )
        return names, Numbering(numbers, tuple(v for v in nothing if v not in both))


def known_classes() -> Mapping[str, tuple[str, ...]]:
    """Class names of known data sets."""
    file = resources.files("featdistill.data").joinpath("segmentation_classes.yaml")
    return {k: tuple(v) for k, v in yaml.safe_load(file.read_text(encoding="utf-8")).items()}


def class_names_of(said: str | None, root: Path | None, known: str | None) -> tuple[str, ...]:
    """Class names: as said, as a file in the data says, or the layout's.

    Raises:
        DataError: nobody says, or the file holds no names.
    """
    if said is not None:
        if said.isdigit() and int(said) > 1:
            return tuple(str(i) for i in range(int(said)))
        if said in known_classes():
            return known_classes()[said]
        if Path(said).is_file():
            return _names_in(Path(said))
        raise DataError(
            f"classes '{said}'",
            expected=f"a number above 1, a file of names, or {', '.join(known_classes())}",
            fix=did_you_mean(said, known_classes()),
        )
    if root is not None and (root / "classes.txt").is_file():
        return _names_in(root / "classes.txt")
    if root is not None and (root / "objectInfo150.txt").is_file():
        return known_classes()["ade20k"]
    if known is not None:
        return known_classes()[known]
    raise DataError(
        f"nothing says how many classes the masks{f' in {str(root)!r}' if root else ''} have",
        fix="give --classes: a number, a file with a name a line, "
        f"or {', '.join(known_classes())}; or put classes.txt into the data",
    )


def _names_in(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the class names in '{file}' ({error})") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) < 2 or len(set(names)) != len(names):
        raise DataError(
            f"'{file}' holds {len(names)} names, {len(set(names))} of them distinct",
            expected="one class name a line, two or more, none twice",
        )
    return names
