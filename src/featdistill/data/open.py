"""From what a user writes after `--data` to sources with their parts."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.core.errors import DataError, did_you_mean
from featdistill.core.seeds import generator
from featdistill.data.index import EXTENSIONS, index_folder
from featdistill.data.sources import (
    ArrowSource,
    FileSource,
    Source,
    Subset,
    TorchvisionSource,
    digits,
    labelled,
)

_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "dev")
_TEST = ("test", "testing")
_TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "stl10": "STL10",
    "flowers102": "Flowers102",
    "food101": "Food101",
    "pets": "OxfordIIITPet",
    "svhn": "SVHN",
}
_IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_IN_MEMORY = 2 << 30  # bytes of parquet below which the encoded images are simply kept


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


def open_data(
    path: str,
    *,
    val: str | None = None,
    val_fraction: float | None = None,
    labels: str | None = None,
    seed: int = 0,
) -> Data:
    """Open a data set.

    Args:
        path: image folder, list file, parquet file or folder, `digits`, `hf:NAME`, or
            `torchvision:NAME` (a known bare name such as `cifar10` too).
        val: a second data set whose train part (or whole) is the validation part.
        val_fraction: hold out this share of the training part (stratified where labelled).
        labels: label budget of the training part: `N` images a class or `P%` of them.
        seed: of the held-out share and of the label budget.

    Raises:
        DataError: there is no such data, or it holds no image.
    """
    data = _open(path)
    if val is not None:
        other = _open(val)
        data = replace(data, val=other.held_out or other.train)
    if val_fraction is not None:
        rest, held = split(data.train, val_fraction, seed)
        data = replace(data, train=rest, val=held)
    if labels is not None:
        data = replace(data, train=label_budget(data.train, labels, seed))
    return data


def _open(path: str) -> Data:
    if path == "digits":
        train, test = digits()
        return Data(train, test=test)
    if path.startswith("hf:"):
        return _hub(path.removeprefix("hf:"))
    name = path.removeprefix("torchvision:")
    if path.startswith("torchvision:") or (name in _TORCHVISION and not Path(path).exists()):
        return _torchvision(name)
    where = Path(path).expanduser()
    try:
        exists = where.exists()
    except OSError:
        exists = False
    if not exists:
        raise _absent(path, where)
    if where.is_dir():
        return _folder(where)
    if where.suffix == ".parquet":
        return Data(_parquet([where], where.name))
    if where.suffix in (".txt", ".csv", ".tsv", ".lst"):
        return Data(_list_file(where))
    raise DataError(
        f"'{path}' is neither a folder, nor a list (.txt, .csv), nor a parquet file",
        fix="give a folder of images",
    )


def _absent(path: str, where: Path) -> DataError:
    siblings = [p.name for p in where.parent.iterdir()] if where.parent.is_dir() else []
    hint = did_you_mean(path, ["digits", *_TORCHVISION]) or did_you_mean(where.name, siblings)
    return DataError(
        f"no data at '{path}'",
        expected="an image folder, a list, a parquet file, digits, hf:NAME or torchvision:NAME",
        fix=hint,
    )


def _folder(root: Path) -> Data:
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder '{root}' ({error.strerror})") from None
    if (root / "dataset_info.json").exists() or (root / "dataset_dict.json").exists():
        return _saved_dataset(root)
    tables = sorted(root.rglob("*.parquet"))
    if tables:
        return _parquet_parts(root, tables)
    parts = {name: e for e in entries if e.is_dir() for name in [e.name.lower()]}
    train = _first(parts, _TRAIN)
    if train is not None:
        val, test = _first(parts, _VAL), _first(parts, _TEST)
        source = _image_folder(train)
        return Data(
            source,
            val=None if val is None else _same_classes(_image_folder(val), source),
            test=None if test is None else _same_classes(_image_folder(test), source),
        )
    return Data(_image_folder(root))


def _first(parts: dict[str, Any], names: Sequence[str]) -> Any:
    return next((parts[name] for name in names if name in parts), None)


def _image_folder(root: Path) -> FileSource:
    """Images below a folder; labelled by their first folder if all lie in one."""
    index = index_folder(root)
    if not index.files:
        raise DataError(
            f"no image in '{root}'", expected=f"files ending in {', '.join(sorted(EXTENSIONS))}"
        )
    tops = [name.partition("/")[0] if "/" in name else None for name in index.files]
    classes = sorted({top for top in tops if top is not None})
    if None in tops or len(classes) < 2:
        return FileSource(str(root), index.root, index.files)
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[top] for top in tops if top is not None], dtype=np.int64)
    return FileSource(str(root), index.root, index.files, labels, tuple(classes))


def _same_classes(source: FileSource, train: FileSource) -> FileSource:
    """The source with its labels numbered as the training part numbers them."""
    if source.classes is None or train.classes is None or source.labels is None:
        return source
    strangers = sorted(set(source.classes) - set(train.classes))
    if strangers:
        raise DataError(
            f"'{source.name}' has classes that '{train.name}' lacks: {_some(strangers)}",
            expected="the same class folders in both",
        )
    number = {name: i for i, name in enumerate(train.classes)}
    table = np.array([number[name] for name in source.classes], dtype=np.int64)
    return replace(source, labels=table[source.labels], classes=train.classes)


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


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
    classes = _class_names(names)
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for name in names], dtype=np.int64)
    return FileSource(str(file), file.parent, files, labels, classes)


def _class_names(names: Iterable[str]) -> tuple[str, ...]:
    unique = set(names)
    numeric = all(name.lstrip("-").isdigit() for name in unique)
    return tuple(sorted(unique, key=int if numeric else str))


def _parquet_parts(root: Path, tables: list[Path]) -> Data:
    """Parquet files by part, from their names: `train.parquet`, `data/test-00000-of-00001...`."""
    groups: dict[str, list[Path]] = {}
    for table in tables:
        stem = table.stem.lower()
        folders = [p.lower() for p in table.relative_to(root).parts[:-1]]
        part = next(
            (
                names[0]
                for names in (_TRAIN, _VAL, _TEST)
                for name in names
                if name in folders or stem.split("-")[0].split("_")[0].split(".")[0] == name
            ),
            "train",
        )
        groups.setdefault(part, []).append(table)
    if "train" not in groups:
        raise DataError(f"no training part in '{root}'", expected="a file like train.parquet")
    opened = {part: _parquet(files, f"{root}/{part}") for part, files in groups.items()}
    return Data(opened["train"], opened.get("val"), opened.get("test"))


def _parquet(files: list[Path], name: str) -> ArrowSource:
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
    columns = table.column_names
    image = next((c for c in _IMAGE_COLUMNS if c in columns), None)
    if image is None:
        raise DataError(
            f"'{name}' has no image column; its columns are {_some(columns)}",
            expected=f"one called {', '.join(_IMAGE_COLUMNS)}",
        )
    if table.num_rows == 0:
        raise DataError(f"no image in '{name}'")
    label = next((c for c in _LABEL_COLUMNS if c in columns), None)
    if label is None:
        return ArrowSource(name, table.column(image), root=root)
    values = table.column(label).to_numpy()
    classes = _arrow_class_names(table.schema, label)
    if not np.issubdtype(values.dtype, np.integer):
        classes = _class_names(str(v) for v in values)
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


def _arrow_class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """Class names from the metadata that the `datasets` library leaves in a schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _dataset_parts(loaded: Any, name: str) -> Data:
    """Parts of a `datasets` Dataset or DatasetDict."""
    if not isinstance(loaded, dict):
        return Data(_from_dataset(loaded, name))
    parts = {key.lower(): value for key, value in loaded.items()}
    train = _first(parts, _TRAIN)
    if train is None:
        train = next(iter(parts.values()))
    val, test = _first(parts, _VAL), _first(parts, _TEST)
    return Data(
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


def _saved_dataset(root: Path) -> Data:
    import datasets

    datasets.disable_progress_bars()
    try:
        return _dataset_parts(datasets.load_from_disk(str(root)), str(root))
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise DataError(f"'{root}' is not readable as a saved data set ({line[:200]})") from None


def _hub(name: str) -> Data:
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


def _torchvision(name: str) -> Data:
    if name not in _TORCHVISION:
        known = list(_TORCHVISION)
        raise DataError(
            f"'{name}' is not a torchvision data set known here",
            expected=", ".join(known),
            fix=did_you_mean(name, known),
        )
    import torchvision

    kind = getattr(torchvision.datasets, _TORCHVISION[name])
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


def split(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Hold out a share of a source, of each class where it has labels; (rest, held out)."""
    order = generator(seed, "split").permutation(len(source))
    groups = (
        [order]
        if source.labels is None
        else [order[source.labels[order] == c] for c in np.unique(source.labels)]
    )
    held = np.sort(np.concatenate([g[: round(fraction * len(g))] for g in groups]))
    rest = np.setdiff1d(np.arange(len(source)), held)
    if not len(held) or not len(rest):
        raise DataError(
            f"a share of {fraction} of the {len(source)} images of '{source.name}' leaves a part "
            "empty",
            fix="change --val-fraction, or give --val-data",
        )
    return Subset(source, rest), Subset(source, held)


def label_budget(source: Source, budget: str, seed: int) -> Source:
    """A stratified, seeded part of a labelled source: `N` images a class, or `P%` of each."""
    labels = labelled(source, "a label budget")
    text = budget.strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else None
        count = None if share is not None else int(text)
    except ValueError:
        raise DataError(f"label budget '{budget}'", expected="N (a class) or P%") from None
    if (share is not None and not 0 < share <= 1) or (count is not None and count < 1):
        raise DataError(f"label budget '{budget}'", expected="N >= 1, or a share up to 100%")
    order = generator(seed, "labels").permutation(len(source))
    chosen = []
    for c in np.unique(labels):
        mine = order[labels[order] == c]
        n = count if count is not None else max(1, round((share or 0) * len(mine)))
        if n > len(mine):
            raise DataError(
                f"label budget of {n} images a class, but class {c} of '{source.name}' has "
                f"{len(mine)}",
                fix="give a smaller --labels",
            )
        chosen.append(mine[:n])
    return Subset(source, np.sort(np.concatenate(chosen)))
