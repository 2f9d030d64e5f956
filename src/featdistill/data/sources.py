"""Where images come from: folders, lists, parquet, hub, torchvision, and the embedded digits.

A source is a sequence of images with, if there are any, labels; it does no random thing.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from featdistill.core.errors import DataError
from featdistill.core.seeds import generator
from featdistill.data.decode import BadImage, Picture, decode, from_pil, open_picture, read_file


class Source(Protocol):
    """Images by number.

    Attributes:
        name: what to call it in messages and reports.
        labels: (n,) int64, or None.
        classes: the labels' names, or None.
    """

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> np.ndarray | None: ...

    @property
    def classes(self) -> tuple[str, ...] | None: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Image `index`, (3, height, width) uint8. Raises BadImage."""

    def look(self, index: int) -> Tensor | Picture:
        """The same for a view, that knows what of it is wanted. Raises BadImage."""

    def identify(self, index: int) -> str:
        """The image's file name, or what comes nearest."""


@dataclass(frozen=True)
class FileSource:
    """Image files.

    Attributes:
        root: what `files` are relative to.
    """

    name: str
    root: Path
    files: Sequence[str]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Tensor:
        return decode(self.data(index))

    def look(self, index: int) -> Tensor | Picture:
        return open_picture(self.data(index))

    def data(self, index: int) -> bytes:
        """The encoded image. Raises BadImage."""
        return read_file(os.path.join(self.root, self.files[index]))

    def identify(self, index: int) -> str:
        return self.files[index]


@dataclass(frozen=True)
class ArraySource:
    """Decoded images in memory, (n, 3, height, width) uint8."""

    name: str
    images: Tensor
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def look(self, index: int) -> Tensor:
        return self.read(index)

    def identify(self, index: int) -> str:
        return f"{self.name}[{index}]"


class ArrowSource:
    """Encoded images in an Arrow column of {bytes, path}, read without copying the table."""

    def __init__(
        self,
        name: str,
        column: Any,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        root: Path | None = None,
    ) -> None:
        self.name, self.labels, self.classes, self.root = name, labels, classes, root
        self._chunks = column.chunks
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _scalar(self, index: int) -> Any:
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[chunk - 1]) if chunk else 0
        return self._chunks[chunk][index - start]

    def _cell(self, index: int) -> dict[str, Any]:
        value = self._scalar(index).as_py()
        return value if isinstance(value, dict) else {"bytes": value, "path": None}

    def read(self, index: int) -> Tensor:
        return decode(self.data(index))

    def look(self, index: int) -> Tensor | Picture:
        return open_picture(self.data(index))

    def data(self, index: int) -> bytes:
        """The encoded image. Raises BadImage."""
        cell = self._cell(index)
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        if cell.get("path"):
            return read_file(Path(self.root or ".", cell["path"]))
        raise BadImage("the cell holds neither bytes nor a path")

    def checksum(self) -> int:
        """Of the encoded bytes of all images."""
        found = 0
        for chunk in self._chunks:
            for buffer in chunk.buffers():
                found = found if buffer is None else zlib.crc32(buffer, found)
        return found

    @property
    def encoded_bytes(self) -> int:
        """The size of all encoded images."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def identify(self, index: int) -> str:
        scalar = self._scalar(index)
        # the name alone: to list a million images must not read them
        named = isinstance(scalar, Mapping) and "path" in scalar
        return (scalar["path"].as_py() if named else None) or f"{self.name}[{index}]"


@dataclass(frozen=True)
class TorchvisionSource:
    """A torchvision data set of (PIL image, label) pairs."""

    name: str
    dataset: Any
    labels: np.ndarray | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Tensor:
        return from_pil(self.dataset[index][0])

    def look(self, index: int) -> Tensor:
        return self.read(index)

    def identify(self, index: int) -> str:
        return f"{self.name}[{index}]"


@dataclass(frozen=True)
class Subset:
    """Some images of a source."""

    source: Source
    chosen: np.ndarray

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.chosen]

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> Tensor:
        return self.source.read(int(self.chosen[index]))

    def look(self, index: int) -> Tensor | Picture:
        return self.source.look(int(self.chosen[index]))

    def identify(self, index: int) -> str:
        return self.source.identify(int(self.chosen[index]))


@dataclass(frozen=True)
class Relabelled:
    """A source under other numbers for its classes."""

    source: Source
    labels: np.ndarray
    classes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Tensor:
        return self.source.read(index)

    def look(self, index: int) -> Tensor | Picture:
        return self.source.look(index)

    def identify(self, index: int) -> str:
        return self.source.identify(index)


class Wrapped:
    """All of a source but how its images are read.

    Args:
        source: what it stands for.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def labels(self) -> np.ndarray | None:
        return self.source.labels

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def identify(self, index: int) -> str:
        return self.source.identify(index)


class Scaled(Wrapped):
    """A source whose pictures are decoded no larger than a view needs them (`Picture.scaled`)."""

    def read(self, index: int) -> Tensor:
        return self.source.read(index)

    def look(self, index: int) -> Tensor | Picture:
        found = self.source.look(index)
        return replace(found, scaled=True) if isinstance(found, Picture) else found


def scaled(source: Source) -> Source:
    """A source that is read as `Scaled` says, and is otherwise what it was."""
    if isinstance(source, Subset | Relabelled):
        return replace(source, source=scaled(source.source))
    return Scaled(source)


def digits(canvas: int = 8) -> tuple[Source, Source]:
    """scikit-learn's 1797 handwritten digits, 8x8: the embedded data, train and test parts.

    Every third image is test data, so that both parts hold all writers and classes.

    Args:
        canvas: side in pixels of a black canvas on which each digit has a place of its own, drawn
            once and for all: unlike 8x8 digits, and like photographs, objects then are anywhere.
    """
    pixels, labels = _digits_table()
    small = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = np.zeros((len(small), canvas, canvas), np.uint8)
    places = generator("digits", canvas).integers(canvas - 8 + 1, size=(len(small), 2))
    for image, digit, (top, left) in zip(large, small, places, strict=True):
        image[top : top + 8, left : left + 8] = digit
    images = torch.from_numpy(large)[:, None].expand(-1, 3, -1, -1).contiguous()
    test = np.arange(len(labels)) % 3 == 2
    classes = tuple(str(d) for d in range(10))
    name = "digits" if canvas == 8 else "scattered-digits"
    train, held = (
        ArraySource(
            f"{name}/{part}",
            images[torch.from_numpy(mask)],
            labels[mask].astype(np.int64),
            classes,
        )
        for part, mask in (("train", ~test), ("test", test))
    )
    return train, held


def _digits_table() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 64) from 0 to 16, and labels, as `sklearn.datasets.load_digits` gives them.

    Read from scikit-learn's own file: to import it takes a second, of five before a first step.
    """
    found = find_spec("sklearn")
    for root in (found and found.submodule_search_locations) or ():
        file = Path(root) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1], table[:, -1]
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return pixels, labels


def labelled(source: Source, what: str) -> np.ndarray:
    """The source's labels.

    Raises:
        DataError: it has none.
    """
    if source.labels is None:
        raise DataError(
            f"'{source.name}' has no labels",
            expected=f"labelled images for {what}: class subfolders, a label column or a .csv list",
        )
    return source.labels
