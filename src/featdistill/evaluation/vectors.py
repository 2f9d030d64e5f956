"""One vector for each image of a source, by way of files: a stop costs a shard's work at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from featdistill.core.errors import DataError
from featdistill.core.types import Batch, Features
from featdistill.data.decode import Picture
from featdistill.data.sources import Source
from featdistill.data.views import Address, View
from featdistill.evaluation.extraction import Extracted, Plan, extract_to_files, shard_size
from featdistill.evaluation.features import Part, features_of
from featdistill.models.backbone import Backbone
from featdistill.models.pooling import Piece, Vector


@dataclass(frozen=True)
class VectorPart(Part):
    """One piece of the vector, as a part of what an extraction writes."""

    piece: Piece

    def of(self, features: Features) -> Tensor:
        return self.piece.of(features)


@dataclass(frozen=True)
class NumberedView:
    """A random view's draw number `number` of each image, whatever the epoch."""

    view: View
    seed: int
    number: int

    def __call__(self, image: Tensor | Picture, address: Address) -> tuple[Tensor, ...]:
        return self.view(image, (self.seed, self.number, address[2]))


@dataclass(frozen=True)
class Stored:
    """Vectors of a source's readable images, in files.

    Attributes:
        channels: D.
        index: (n,) each row's place in the source.
    """

    folder: Path
    parts: tuple[Part, ...]
    done: Extracted
    index: np.ndarray

    @property
    def channels(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, out: Tensor) -> None:
        """Read all of it into (n, D) float32, shard by shard."""
        first = 0
        for shard in self.done.shards:
            with safe_open(self.folder / shard.file, framework="pt") as file:
                column = 0
                for part in self.parts:
                    values = file.get_tensor(part.name)
                    place = slice(column, column + part.shape[0])
                    out[first : first + len(values), place] = values
                    column = place.stop
            first += shard.rows
        assert first == len(out)


def parts_of(backbone: Backbone, vector: Vector) -> tuple[Part, ...]:
    """The pieces of a vector with their widths."""
    black = torch.zeros(1, 3, *backbone.image_size, dtype=torch.uint8)
    nowhere = torch.zeros(1, dtype=torch.int64)
    [(_, seen)] = features_of(backbone, [Batch((black,), None, nowhere, nowhere)], vector.layers)
    return tuple(
        VectorPart(
            "output" if piece.layer is None else f"layers.{piece.layer}",
            "pooled",
            piece.layer,
            (piece.of(seen).shape[1],),
            piece,
        )
        for piece in vector.pieces
    )


def store_vectors(
    backbone: Backbone,
    vector: Vector,
    source: Source,
    view: View,
    *,
    folder: Path,
    batch_size: int,
    workers: int | None,
    bad_image_limit: float,
) -> Stored:
    """Write the vectors of a source's images into a folder, or what is missing of them there.

    Raises:
        DataError: too many images are unreadable.
        Interrupted: asked to stop by a signal.
        RunError: the disk refuses, or the folder holds vectors of other weights or images.
    """
    parts = parts_of(backbone, vector)
    plan = Plan(
        source=source,
        view=view,
        parts=parts,
        dtype=torch.float32,
        format="safetensors",
        batch_size=batch_size,
        shard_images=shard_size(parts, torch.float32, batch_size),
        workers=workers,
        bad_image_limit=bad_image_limit,
    )
    folder.mkdir(parents=True, exist_ok=True)
    done = extract_to_files(backbone, plan, folder=folder, resume=True)
    lost = {row["index"] for row in done.unreadable}
    index = np.array([i for i in range(len(source)) if i not in lost], dtype=np.int64)
    return Stored(folder, parts, done, index)


def need_all(stored: Stored, source: Source) -> None:
    """Raise DataError if an image could not be read."""
    for row in stored.done.unreadable[:1]:
        raise DataError(
            f"cannot read an image of '{source.name}': {row['reason']}",
            fix="mend or remove it; a score needs every image",
        )


def read_all(stored: Sequence[Stored]) -> Tensor:
    """The vectors of several views of the same images, one view after the other: (views n, D)."""
    lengths = {len(one) for one in stored}
    assert len(lengths) == 1
    out = torch.empty(len(stored) * lengths.pop(), stored[0].channels)
    for one, place in zip(stored, out.chunk(len(stored)), strict=True):
        one.read(place)
    return out
