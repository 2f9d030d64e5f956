"""Images in tables: parquet files, saved `datasets`, and the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.core.errors import DataError
from featdistill.core.parsing import parse_json
from featdistill.data.parts import TEST, TRAIN, VAL, Data, class_names, first, numbered_as, some
from featdistill.data.sources import ArrowSource

_IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_IN_MEMORY = 2 << 30  # bytes of parquet below which the encoded images are simply kept


def open_parquet_folder(root: Path, tables: list[Path]) -> Data:
    """Parquet files by part, from their names: `train.parquet`, `data/test-00000-of-00001...`."""
    groups: dict[str, list[Path]] = {}
    for table in tables:
        words = set(re.split(r"[-_./\\ ]", str(table.relative_to(root)).lower()))
        part = next((p[0] for p in (TEST, VAL, TRAIN) if words & set(p)), "unnamed")
        groups.setdefault(part, []).append(table)
    if "unnamed" in groups and len(groups) > 1:
        raise DataError(
            f"'{groups['unnamed'][0].name}' in '{root}' names no part, and other files do",
            expected="train, val or test in the name of each parquet file, or of none",
        )
    if "unnamed" in groups:
        groups["train"] = groups.pop("unnamed")
    if "train" not in groups:
        raise DataError(f"no training part in '{root}'", expected="a file like train.parquet")
    opened = {part: read_parquet(files, f"{root}/{part}") for part, files in groups.items()}
    return _data(opened["train"], opened.get("val"), opened.get("test"))


def _data(train: ArrowSource, val: ArrowSource | None, test: ArrowSource | None) -> Data:
    held = (None if part is None else numbered_as(train, part) for part in (val, test))
    return Data(train, *held)


def read_parquet(files: list[Path], name: str) -> ArrowSource:
    import pyarrow
    import pyarrow.parquet

    if sum(os.path.getsize(f) for f in files) > _IN_MEMORY:
        import datasets

        datasets.disable_progress_bars()
        loaded = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
        return _arrow(loaded.data.table, name, root=files[0].parent)
    try:
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(f) for f in files])
    except (pyarrow.ArrowException, OSError) as error:
        line = " ".join(str(error).split())
        raise DataError(f"'{name}' is not readable as parquet ({line[:200]})") from None
    return _arrow(table, name, root=files[0].parent)


def _arrow(table: Any, name: str, root: Path | None = None) -> ArrowSource:
    import pyarrow

    columns = table.column_names
    image = next((c for c in _IMAGE_COLUMNS if c in columns), None)
    if image is None:
        raise DataError(
            f"'{name}' has no image column; its columns are {some(columns)}",
            expected=f"one called {', '.join(_IMAGE_COLUMNS)}",
        )
    kind = table.schema.field(image).type
    known = (pyarrow.types.is_struct, pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    if not any(check(kind) for check in known):
        raise DataError(
            f"column '{image}' of '{name}' holds {kind}",
            expected="the bytes of image files, or {bytes, path}",
        )
    if table.num_rows == 0:
        raise DataError(f"no image in '{name}'")
    label = next((c for c in _LABEL_COLUMNS if c in columns), None)
    if label is None:
        return ArrowSource(name, table.column(image), root=root)
    nulls = table.column(label).null_count
    if nulls or pyarrow.types.is_floating(table.schema.field(label).type):
        raise DataError(
            f"column '{label}' of '{name}' holds {'empty cells' if nulls else 'fractions'}",
            expected="a class for every image",
        )
    values = table.column(label).to_numpy()
    if np.issubdtype(values.dtype, np.integer) and values.max() < 0:
        return ArrowSource(name, table.column(image), root=root)  # hidden, as of a challenge's test
    classes = _metadata_names(table.schema, label)
    if not np.issubdtype(values.dtype, np.integer):
        classes = class_names(str(v) for v in values)
        number = {c: i for i, c in enumerate(classes)}
        values = np.array([number[str(v)] for v in values])
    elif classes is None:
        classes = tuple(str(i) for i in range(int(values.max()) + 1))
    if values.min() < 0 or values.max() >= len(classes):
        raise DataError(
            f"'{name}' has labels from {values.min()} to {values.max()}",
            expected=f"numbers from 0 to {len(classes) - 1} (-1 often marks a hidden test label)",
        )
    return ArrowSource(name, table.column(image), values.astype(np.int64), classes, root)


def _metadata_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """Class names from the metadata that the `datasets` library leaves in a schema."""
    try:
        features = parse_json(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _dataset_parts(loaded: Any, name: str) -> Data:
    """Parts of a `datasets` Dataset or DatasetDict."""
    if not isinstance(loaded, dict):
        return Data(_from_dataset(loaded, name))
    parts = {key.lower(): value for key, value in loaded.items()}
    train = first(parts, TRAIN)
    if train is None:
        train = next(iter(parts.values()))
    val, test = first(parts, VAL), first(parts, TEST)
    return _data(
        _from_dataset(train, f"{name}/train"),
        None if val is None else _from_dataset(val, f"{name}/val"),
        None if test is None else _from_dataset(test, f"{name}/test"),
    )


def _from_dataset(dataset: Any, name: str) -> ArrowSource:
    if (
        dataset._indices is not None
    ):  # a shuffled or filtered view: make its table's order the view's
        dataset = dataset.flatten_indices()
    return _arrow(dataset.data.table, name)


def open_saved_dataset(root: Path) -> Data:
    import datasets

    datasets.disable_progress_bars()
    try:
        return _dataset_parts(datasets.load_from_disk(str(root)), str(root))
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise DataError(f"'{root}' is not readable as a saved data set ({line[:200]})") from None


def open_hub(name: str) -> Data:
    import datasets

    datasets.disable_progress_bars()
    try:
        return _dataset_parts(datasets.load_dataset(name), f"hf:{name}")
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds, for one reason each
        line = " ".join(str(error).split())
        raise DataError(
            f"cannot load '{name}' from the Hugging Face hub ({line[:200]})",
            fix="check the name and the connection, or give a local folder or parquet file",
        ) from None
