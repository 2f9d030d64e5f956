"""From what a user writes after `--data` to sources with their parts."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from featdistill.core.errors import DataError, did_you_mean
from featdistill.data.index import EXTENSIONS, index_folder
from featdistill.data.names import DIGITS, TORCHVISION, check_there, is_torchvision
from featdistill.data.parts import TEST, TRAIN, VAL, Data, class_names, first, numbered_as
from featdistill.data.sources import FileSource, TorchvisionSource, digits, scaled
from featdistill.data.splits import label_budget, split
from featdistill.data.tables import (
    open_hub,
    open_parquet_folder,
    open_saved_dataset,
    read_parquet,
)

# where parquet files lie in a data set; to look below every folder would walk all images
_TABLES = ("*.parquet", "data/*.parquet", *(f"{p}/*.parquet" for p in (*TRAIN, *VAL, *TEST)))


def open_data(
    path: str,
    *,
    val: str | None = None,
    val_fraction: float | None = None,
    labels: str | None = None,
    seed: int = 0,
    decode: Literal["exact", "fast"] = "exact",
) -> Data:
    """Open a data set.

    Args:
        path: image folder, list file, parquet file or folder, `digits`, `hf:NAME`, or
            `torchvision:NAME` (a known bare name such as `cifar10` too).
        val: a second data set whose train part (or whole) is the validation part.
        val_fraction: hold out this share of the training part (stratified where labelled).
        labels: label budget of the training part: `N` images a class or `P%` of them.
        seed: of the held-out share and of the label budget.
        decode: fast: large pictures no larger than their crops need them (`Picture.scaled`).

    Raises:
        DataError: there is no such data, or it holds no image.
    """
    data = _open(path)
    if val is not None:
        other = _open(val)
        held = other.train if other.held_out is None else other.held_out
        data = replace(data, val=numbered_as(data.train, held))
    if val_fraction is not None:
        rest, held = split(data.train, val_fraction, seed)
        data = replace(data, train=rest, val=held)
    if labels is not None:
        data = replace(data, train=label_budget(data.train, labels, seed))
    return _scaled(data) if decode == "fast" else data


def _scaled(data: Data) -> Data:
    parts = (None if part is None else scaled(part) for part in (data.val, data.test))
    return Data(scaled(data.train), *parts)


def _open(path: str) -> Data:
    if path in DIGITS:
        train, test = digits(DIGITS[path])
        return Data(train, test=test)
    if path.startswith("hf:"):
        return open_hub(path.removeprefix("hf:"))
    if is_torchvision(path):
        return _torchvision(path.removeprefix("torchvision:"))
    where = check_there(path)
    assert where is not None
    if where.is_dir():
        return _folder(where)
    if where.suffix == ".parquet":
        return Data(read_parquet([where], where.name))
    if where.suffix in (".txt", ".csv", ".tsv", ".lst"):
        return Data(_list_file(where))
    raise DataError(
        f"'{path}' is neither a folder, nor a list (.txt, .csv), nor a parquet file",
        fix="give a folder of images",
    )


def _folder(root: Path) -> Data:
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder '{root}' ({error.strerror})") from None
    if (root / "dataset_info.json").exists() or (root / "dataset_dict.json").exists():
        return open_saved_dataset(root)
    tables = sorted(t for pattern in _TABLES for t in root.glob(pattern))
    if tables:
        return open_parquet_folder(root, tables)
    parts = {name: e for e in entries if e.is_dir() for name in [e.name.lower()]}
    train = first(parts, TRAIN)
    if train is not None:
        val, test = first(parts, VAL), first(parts, TEST)
        source = _image_folder(train)
        held = (
            None if part is None else numbered_as(source, _image_folder(part, source.classes))
            for part in (val, test)
        )
        return Data(source, *held)
    return Data(_image_folder(root))


def _image_folder(root: Path, known: tuple[str, ...] | None = None) -> FileSource:
    """Images below a folder; labelled by their first folder if all lie in one.

    A single folder is a class only where it is `known` as one.
    """
    index = index_folder(root)
    if not index.files:
        raise DataError(
            f"no image in '{root}'", expected=f"files ending in {', '.join(sorted(EXTENSIONS))}"
        )
    tops = [name.partition("/")[0] if "/" in name else None for name in index.files]
    classes = sorted({top for top in tops if top is not None})
    if None in tops or (len(classes) < 2 and classes[0] not in (known or ())):
        return FileSource(str(root), index.root, index.files)
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[top] for top in tops if top is not None], dtype=np.int64)
    return FileSource(str(root), index.root, index.files, labels, tuple(classes))


def _list_file(file: Path) -> FileSource:
    """A list: a path a line (.txt), or path and label columns (.csv, .tsv)."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list '{file}' ({error})") from None
    separator = "," if file.suffix == ".csv" else "\t"
    if file.suffix in (".csv", ".tsv"):
        rows = [row for row in csv.reader(text.splitlines(), delimiter=separator) if row]
    else:
        rows = [[line.strip()] for line in text.splitlines() if line.strip()]
    if rows and Path(rows[0][0]).suffix.lower() not in EXTENSIONS:
        rows = rows[1:]  # a header
    if not rows:
        raise DataError(f"no image in the list '{file}'", expected="one image path a line")
    if len({len(row) for row in rows}) != 1:
        raise DataError(f"the rows of '{file}' differ in length", expected="path or path,label")
    files = [row[0] for row in rows]
    missing = next((f for f in files if not (file.parent / f).exists()), None)
    if missing is not None:
        raise DataError(
            f"'{file}' lists '{missing}', which does not exist",
            expected=f"paths relative to '{file.parent}', or absolute ones",
        )
    if len(rows[0]) < 2:
        return FileSource(str(file), file.parent, files)
    names = [row[1] for row in rows]
    classes = class_names(names)
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for name in names], dtype=np.int64)
    return FileSource(str(file), file.parent, files, labels, classes)


def _torchvision(name: str) -> Data:
    if name not in TORCHVISION:
        known = list(TORCHVISION)
        raise DataError(
            f"'{name}' is not a torchvision data set known here",
            expected=", ".join(known),
            fix=did_you_mean(name, known),
        )
    import torchvision

    kind = getattr(torchvision.datasets, TORCHVISION[name])
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "featdistill" / "data"
    splits = ("trainval", "test") if name == "pets" else ("train", "test")
    by_flag = name.startswith("cifar")
    try:
        train, test = (
            kind(home, download=True, **({"train": s == "train"} if by_flag else {"split": s}))
            for s in splits
        )
    except (OSError, RuntimeError) as error:
        line = " ".join(str(error).split())
        raise DataError(
            f"cannot download '{name}' ({line[:160]})",
            fix="connect to the internet, or give a local folder or parquet file",
        ) from None
    return Data(_wrap(train, f"{name}/train"), test=_wrap(test, f"{name}/test"))


def _wrap(dataset: Any, name: str) -> TorchvisionSource:
    labels = next(
        (getattr(dataset, a) for a in ("targets", "labels", "_labels") if hasattr(dataset, a)), None
    )
    array = None if labels is None else np.asarray(labels, dtype=np.int64)
    classes = getattr(dataset, "classes", None)
    if classes is None and array is not None:
        classes = [str(i) for i in range(int(array.max()) + 1)]
    return TorchvisionSource(name, dataset, array, None if classes is None else tuple(classes))
