"""Tables with an image and a mask column: parquet, saved `datasets`, the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from featdistill.core.errors import DataError
from featdistill.data.masks import MaskColumn
from featdistill.data.parts import TEST, TRAIN, VAL, some
from featdistill.data.sources import ArrowSource

_IMAGES = ("image", "img", "images", "pixel_values", "picture")
_MASKS = ("annotation", "mask", "label", "labels", "segmentation", "segmentation_mask", "semantic")
Pair = tuple[ArrowSource, MaskColumn]


def pair_tables(path: str) -> dict[str, Pair]:
    """Image and mask columns by part (`train`, `val`).

    Raises:
        DataError: unreadable, no such columns, or no training part.
    """
    import datasets
    import pyarrow.parquet

    datasets.disable_progress_bars()
    root = Path(path)
    try:
        if path.startswith("hf:"):
            loaded: Any = datasets.load_dataset(path.removeprefix("hf:"))
        elif (root / "dataset_info.json").exists() or (root / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(path)
        elif root.is_file():
            loaded = pyarrow.parquet.read_table(root)
        else:
            loaded = _parquet_parts(root)
    except DataError:
        raise
    except Exception as error:  # these libraries raise many kinds, for one reason each
        line = " ".join(str(error).split())
        raise DataError(
            f"cannot load '{path}' ({line[:200]})", fix="check the name and the connection"
        ) from None
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    known = {**dict.fromkeys(TRAIN, "train"), **dict.fromkeys(VAL, "val")}
    found = {
        known[name.lower()]: _columns(_arrow(table), f"{path}/{name}", root)
        for name, table in parts.items()
        if name.lower() in known
    }
    if "train" not in found:
        raise DataError(f"'{path}' has no training part; its parts are {some(sorted(parts))}")
    return found


def _parquet_parts(root: Path) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    groups: dict[str, list[Path]] = {}
    for file in sorted(root.glob("**/*.parquet")):
        words = set(re.split(r"[-_./\\ ]", str(file.relative_to(root)).lower()))
        part = next((p[0] for p in (TEST, VAL, TRAIN) if words & set(p)), "train")
        groups.setdefault(part, []).append(file)
    return {
        part: pyarrow.concat_tables([pyarrow.parquet.read_table(f) for f in files])
        for part, files in groups.items()
    }


def _arrow(table: Any) -> Any:
    """The Arrow table of a `datasets` Dataset, in the order that it shows; tables as they are."""
    if not hasattr(table, "data"):
        return table
    if table._indices is not None:
        table = table.flatten_indices()
    return table.data.table


def _columns(table: Any, name: str, root: Path) -> Pair:
    columns = table.column_names
    image = next((c for c in _IMAGES if c in columns), None)
    mask = next((c for c in _MASKS if c in columns and c != image), None)
    for wanted, found, known in (("image", image, _IMAGES), ("mask", mask, _MASKS)):
        if found is None:
            raise DataError(
                f"'{name}' has no {wanted} column; its columns are {some(columns)}",
                expected=f"one called {', '.join(known)}",
            )
    _check_encoded(table, mask, name)
    below = root if root.is_dir() else root.parent
    return (
        ArrowSource(name, table.column(image), root=below),
        MaskColumn(name, table.column(mask), root=below),
    )


def _check_encoded(table: Any, column: Any, name: str) -> None:
    import pyarrow.types

    kind = table.schema.field(column).type
    known = (pyarrow.types.is_struct, pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    if not any(check(kind) for check in known):
        raise DataError(
            f"column '{column}' of '{name}' holds {kind}",
            expected="the bytes of mask images, or {bytes, path}",
        )
