"""Images with a class for every pixel: pairs of image and mask, checked as they are read.

A mask in a file holds *values*; `Numbering` turns them into class numbers 0 .. K - 1, and those
that mean nothing into UNLABELLED.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from featdistill.core.errors import DataError
from featdistill.data.decode import BadImage, Picture, open_image, read_file
from featdistill.data.parts import some
from featdistill.data.sources import ArrowSource, Source

UNLABELLED = -1
_STRANGE = -2
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")


class Masks(Protocol):
    """Masks by number, as encoded bytes."""

    def __len__(self) -> int: ...

    def data(self, index: int) -> bytes:
        """The mask's file. Raises BadImage where it cannot be read."""

    def identify(self, index: int) -> str:
        """The mask's file name, or what comes nearest."""


@dataclass(frozen=True)
class MaskFiles:
    """Mask files below a folder."""

    root: Path
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def data(self, index: int) -> bytes:
        return read_file(self.root / self.files[index])

    def identify(self, index: int) -> str:
        return str(self.root / self.files[index])


class MaskColumn(ArrowSource):
    """Masks in an Arrow column of {bytes, path}."""

    def identify(self, index: int) -> str:
        return f"{super().identify(index)} (mask {index} of '{self.name}')"


@dataclass(frozen=True)
class Numbering:
    """Which value of a mask stands for which class.

    Attributes:
        values: of each class, in the classes' order.
        unlabelled: values that mean no class.
    """

    values: tuple[int, ...]
    unlabelled: tuple[int, ...]

    @cached_property
    def _table(self) -> np.ndarray:
        table = np.full(1 << 16, _STRANGE, dtype=np.int16)
        table[list(self.unlabelled)] = UNLABELLED
        table[list(self.values)] = np.arange(len(self.values))
        return table

    def classes_of(self, values: np.ndarray, where: str) -> np.ndarray:
        """Class numbers, int16.

        Raises:
            DataError: a value that is neither a class nor unlabelled.
        """
        if values.min() < 0 or values.max() >= len(self._table):
            stranger = values.min() if values.min() < 0 else values.max()
            raise self._strange([int(stranger)], where)
        found = self._table[values]
        if found.min() == _STRANGE:
            raise self._strange(np.unique(values[found == _STRANGE]).tolist(), where)
        return found

    def _strange(self, values: list[int], where: str) -> DataError:
        low, high = min(self.values), max(self.values)
        none = f", or {some([str(v) for v in self.unlabelled])} for none" if self.unlabelled else ""
        return DataError(
            f"mask '{where}' holds {some([str(v) for v in values])}, which is no class",
            expected=f"values from {low} to {high} for the {len(self.values)} classes{none}",
            fix="mend it, or give --classes, --data.first_class or --data.unlabelled",
        )

    def values_of(self, classes: np.ndarray) -> np.ndarray:
        """Class numbers as the values by which this data set's masks name them, uint8 or uint16."""
        kind = np.uint8 if max(self.values) < 256 else np.uint16
        return np.array(self.values, dtype=kind)[classes]


def decode_mask(data: bytes, where: str) -> np.ndarray:
    """A mask file's values, (height, width) integers.

    Raises:
        BadImage: not an image, or damaged.
        DataError: a colour image.
    """
    try:
        with open_image(io.BytesIO(data)) as image:
            check_mode(image.mode, where)
            values = np.array(image)
            return values.astype(np.uint8) if values.dtype == bool else values
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins let their parsers' errors of any kind through
        raise BadImage(
            f"mask '{where}': {str(error).split(' <')[0] or type(error).__name__}"
        ) from None


def check_mode(mode: str, where: str) -> None:
    if mode not in _INDEX_MODES:
        raise DataError(
            f"mask '{where}' is a colour image ({mode})",
            expected="one channel of class numbers (grey or palette PNG)",
            fix="convert its colours to class numbers first",
        )


def check_size(image: tuple[int, int], mask: tuple[int, int], of: str, where: str) -> None:
    if image != mask:
        raise DataError(
            f"mask '{where}' is {mask[1]}x{mask[0]} pixels, its image '{of}' "
            f"{image[1]}x{image[0]} (width x height)",
            expected="the same size",
        )


@dataclass(frozen=True)
class PairSource:
    """Images and their masks.

    Attributes:
        classes: K names.
        numbering: of the masks.
        chosen: which of the pairs are there; None: all.
    """

    name: str
    images: Source
    masks: Masks
    classes: tuple[str, ...]
    numbering: Numbering
    chosen: tuple[int, ...] | None = None

    @property
    def labels(self) -> np.ndarray | None:
        """No label is for a whole image."""
        return None

    def __len__(self) -> int:
        return len(self.images) if self.chosen is None else len(self.chosen)

    def place(self, index: int) -> int:
        """Where pair `index` is among all images and masks."""
        return index if self.chosen is None else self.chosen[index]

    def read(self, index: int) -> Tensor:
        return self.images.read(self.place(index))

    def look(self, index: int) -> Tensor | Picture:
        """The image for a view."""
        return self.images.look(self.place(index))

    def identify(self, index: int) -> str:
        return self.images.identify(self.place(index))

    def read_mask(self, index: int) -> Tensor:
        """Mask `index`, (height, width) int16 class numbers, UNLABELLED where there is none.

        Raises:
            BadImage: it cannot be decoded.
            DataError: it is in colour, or holds a value that is no class.
        """
        place = self.place(index)
        where = self.masks.identify(place)
        values = decode_mask(self.masks.data(place), where)
        return torch.from_numpy(self.numbering.classes_of(values, where))

    def read_pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (3, height, width) uint8 and mask (height, width) int16.

        Raises:
            BadImage: one of them cannot be decoded.
            DataError: as `read_mask`, or their sizes differ.
        """
        image, mask = self.read(index), self.read_mask(index)
        place = self.place(index)
        check_size(
            (image.shape[1], image.shape[2]),
            (mask.shape[0], mask.shape[1]),
            self.images.identify(place),
            self.masks.identify(place),
        )
        return image, mask

    def subset(self, chosen: Any) -> PairSource:
        """Some of the pairs, by number."""
        places = tuple(self.place(int(i)) for i in chosen)
        return PairSource(self.name, self.images, self.masks, self.classes, self.numbering, places)
