"""Features in files: shards that are there whole or not at all, and the list that vouches for them.

    features-00000.safetensors   rows of images 0 .. N - 1: features, `index`, `label`
    features-00001.safetensors   ...
    shards.json                  which shards are done: checksum, rows, unreadable images
    images.csv                   image, index, label, file, row; written when all are done

Dimensions: n rows of a shard, one an image, in the data's order. An unreadable image has no row.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from featdistill.core.errors import RunError
from featdistill.core.parsing import parse_json
from featdistill.core.records import sync, write_json
from featdistill.data.sources import Source
from featdistill.evaluation.features import Part
from featdistill.models.weights import file_hash

FormatName = Literal["safetensors", "parquet"]

_FORMAT = 1
_DTYPES = {torch.float32: "float32", torch.float16: "float16"}


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Raise RunError, in one line, where `path` cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RunError(
            f"cannot write '{path}' ({reason})",
            fix="make room, then go on with the same command and --resume; finished shards stay",
        ) from None


def _draft(path: Path) -> Path:
    """Where `path` is written, until it is whole; a kill leaves its remains there, and only there.

    safetensors makes a temporary file of its own beside the one that it is given.
    """
    folder = path.parent / ".writing"
    folder.mkdir(exist_ok=True)
    return folder / path.name


def _publish(path: Path) -> None:
    """The draft becomes the file, durably."""
    draft = _draft(path)
    # safetensors' files are their owner's alone; these are as readable as any new file
    draft.chmod(draft.parent.stat().st_mode & 0o666)
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)


def clear_drafts(folder: Path) -> None:
    """Remove what was being written when a process ended."""
    shutil.rmtree(folder / ".writing", ignore_errors=True)
    for file in folder.glob(".*.json.*.tmp"):  # `write_json`'s
        file.unlink(missing_ok=True)


def as_text(name: str) -> str:
    """A file name as valid Unicode; bytes that are none become `\\udc..`, in letters."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class Rows:
    """Rows for a shard, on the CPU.

    Attributes:
        images: n names.
        index: (n,) int64, each image's place in the data.
        label: (n,) int64, or None.
        features: name -> (n, ...), in the type to be stored.
    """

    images: tuple[str, ...]
    index: Tensor
    label: Tensor | None
    features: Mapping[str, Tensor]


class ShardWriter(ABC):
    """Takes a shard's rows batch by batch; at the end of the `with` block the file is there.

    If the block fails, there is no file. The methods raise RunError if the disk refuses.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with disk(self.file):
                    self._finish()
                    _publish(self.file)
        finally:
            with suppress(OSError):
                self._abandon()

    def add(self, rows: Rows) -> None:
        """Take the next rows."""
        with disk(self.file):
            self._add(rows)

    @abstractmethod
    def _add(self, rows: Rows) -> None: ...

    @abstractmethod
    def _finish(self) -> None:
        """Complete the file."""

    def _abandon(self) -> None:  # noqa: B027 - most hold nothing open
        """Let go of the file, complete or not."""


class _Safetensors(ShardWriter):
    """A safetensors header comes first and says all sizes: the shard waits in memory until then."""

    def __init__(self, file: Path, parts: Sequence[Part], dtype: torch.dtype, capacity: int):
        super().__init__(file)
        # filled in place: to join batches at the end would take the memory twice
        self._tensors = {p.name: torch.empty(capacity, *p.shape, dtype=dtype) for p in parts}
        self._capacity, self._rows = capacity, 0

    def _add(self, rows: Rows) -> None:
        place = slice(self._rows, self._rows + len(rows.index))
        columns = {**rows.features, "index": rows.index}
        if rows.label is not None:
            columns["label"] = rows.label
        for name, values in columns.items():
            if name not in self._tensors:
                self._tensors[name] = torch.empty(self._capacity, dtype=torch.int64)
            self._tensors[name][place] = values
        self._rows = place.stop

    def _finish(self) -> None:
        save_file({k: v[: self._rows] for k, v in self._tensors.items()}, _draft(self.file))


class _Parquet(ShardWriter):
    """A row an image, a row group a batch; features as lists of fixed length."""

    def __init__(self, file: Path, parts: Sequence[Part], dtype: torch.dtype, labelled: bool):
        import pyarrow
        import pyarrow.parquet

        super().__init__(file)
        self._arrow = pyarrow
        kind = {torch.float32: pyarrow.float32(), torch.float16: pyarrow.float16()}[dtype]
        columns: dict[str, Any] = {"image": pyarrow.string(), "index": pyarrow.int64()}
        if labelled:
            columns["label"] = pyarrow.int64()
        plain = list(columns)
        columns |= {p.name: pyarrow.list_(kind, torch.Size(p.shape).numel()) for p in parts}
        shapes = json.dumps({p.name: p.shape for p in parts})
        self._schema = pyarrow.schema(columns.items(), metadata={"shapes": shapes})
        with disk(file):
            self._writer = pyarrow.parquet.ParquetWriter(
                _draft(file),
                self._schema,
                compression="none",  # features hardly compress
                use_dictionary=False,
                write_statistics=plain,
            )

    def _add(self, rows: Rows) -> None:
        columns: dict[str, Any] = {"image": list(rows.images), "index": rows.index.numpy()}
        if rows.label is not None:
            columns["label"] = rows.label.numpy()
        for name, values in rows.features.items():
            kind = self._schema.field(name).type
            flat = self._arrow.array(values.contiguous().numpy().reshape(-1), kind.value_type)
            columns[name] = self._arrow.FixedSizeListArray.from_arrays(flat, type=kind)
        self._writer.write_table(self._arrow.table(columns, schema=self._schema))

    def _finish(self) -> None:
        self._writer.close()

    def _abandon(self) -> None:
        self._writer.close()


def new_shard(
    file: Path, parts: Sequence[Part], dtype: torch.dtype, *, capacity: int, labelled: bool
) -> ShardWriter:
    """A writer by the file's ending.

    Args:
        file: `.safetensors` or `.parquet`.
        dtype: of the features, float32 or float16.
        capacity: most rows that it will take.
    """
    if file.suffix == ".parquet":
        return _Parquet(file, parts, dtype, labelled)
    return _Safetensors(file, parts, dtype, capacity)


@dataclass(frozen=True)
class Shard:
    """A shard that is done: images `start` .. `stop` of the data, less the unreadable ones.

    Attributes:
        file: its name in the folder.
        sha256: 12 characters.
        unreadable: {index, reason} of each image without a row.
    """

    file: str
    start: int
    stop: int
    sha256: str
    unreadable: tuple[Mapping[str, Any], ...] = ()

    @property
    def rows(self) -> int:
        return self.stop - self.start - len(self.unreadable)


class Ledger:
    """shards.json: the shards that are done, and what made them.

    Args:
        folder: where they are.
        facts: what all shards must have in common: data, weights, size.
        resume: read what is there.

    Raises:
        RunError: what is there was made from something else, or is damaged.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], *, resume: bool) -> None:
        self.path, self.facts = folder / "shards.json", dict(facts)
        self.shards: dict[str, Shard] = {}
        if resume and self.path.exists():
            before = self._read()
            for name, value in self.facts.items():
                if before.get(name) != value:
                    raise RunError(
                        f"the features in '{folder}' were begun with other {name} "
                        f"({before.get(name)} -> {value})",
                        fix="put them back, or begin anew in another --out",
                    )
        else:
            self._write()

    def _read(self) -> dict[str, Any]:
        try:
            value: dict[str, Any] = parse_json(self.path.read_text(encoding="utf-8"))
            if value.pop("format") != _FORMAT:
                raise ValueError("of another format")
            for row in value.pop("shards"):
                row.pop("rows")
                shard = Shard(**{**row, "unreadable": tuple(row["unreadable"])})
                self.shards[shard.file] = shard
            return value
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"'{self.path}' is damaged ({error})",
                fix="delete it, and --resume makes every shard again",
            ) from None

    def _write(self) -> None:
        shards = sorted(self.shards.values(), key=lambda s: s.start)
        rows = [{**asdict(s), "rows": s.rows} for s in shards]
        with disk(self.path):
            write_json(self.path, {"format": _FORMAT, **self.facts, "shards": rows})

    def is_whole(self, file: str) -> bool:
        """Whether a shard is done and its bytes are as they were written."""
        path = self.path.with_name(file)
        if file not in self.shards or not path.is_file():
            return False
        return file_hash(path) == self.shards[file].sha256

    def add(
        self, file: str, start: int, stop: int, unreadable: Sequence[Mapping[str, Any]]
    ) -> None:
        """Note a shard that was written just now."""
        checksum = file_hash(self.path.with_name(file))
        self.shards[file] = Shard(file, start, stop, checksum, tuple(unreadable))
        self._write()


def write_images(path: Path, source: Source, shards: Sequence[Shard]) -> None:
    """The table that ties each image to its row: image, index, label, file, row.

    Raises:
        RunError: the disk refuses.
    """
    labels = source.labels
    with disk(path):
        with open(_draft(path), "w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(["image", "index", *["label"] * (labels is not None), "file", "row"])
            for shard in shards:
                missing = {u["index"] for u in shard.unreadable}
                present = (i for i in range(shard.start, shard.stop) if i not in missing)
                for row, i in enumerate(present):
                    label = [] if labels is None else [int(labels[i])]
                    writer.writerow([as_text(source.identify(i)), i, *label, shard.file, row])
        _publish(path)
