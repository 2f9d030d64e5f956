"""Files that others may have written, read as data: bounded, and without running anything.

`json`, `yaml` and `numpy` run no code as they are used here, but what they read may be nested
without end, stand for far more than its bytes (aliases in YAML, zeros in a zip), or claim a size
that it has not.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_DEEPEST = 64  # levels; a configuration has four
_MOST_NODES = 100_000  # of a YAML file, aliases followed; a configuration has two hundred
_LARGEST_ARRAYS = 1 << 30  # bytes in one file of arrays; those of a landscape are megabytes


def parse_json(text: str | bytes) -> Any:
    """JSON text as Python's values.

    Raises:
        ValueError: it is no JSON, or nested without end.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """YAML text as plain values: no tag of it calls anything.

    Raises:
        yaml.YAMLError: it is no YAML, has a tag, is nested without end, or its aliases stand for
            more than any configuration.
    """
    import yaml

    try:
        tree = yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError) as error:  # such as a date that there is not
        raise yaml.YAMLError(str(error)) from None
    if not _is_small(tree):
        raise yaml.YAMLError("it is nested without end, or holds more than a configuration can")
    return tree


def _is_small(tree: Any) -> bool:
    """Whether a tree is of bounded size and depth with its aliases followed."""
    seen, todo = 0, [(tree, 0)]
    while todo:
        value, depth = todo.pop()
        seen += 1
        if seen > _MOST_NODES or depth > _DEEPEST:
            return False
        if isinstance(value, dict):
            todo += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple | set):
            todo += [(inner, depth + 1) for inner in value]
    return True


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file, none of them of Python objects.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, damaged, larger than any record's, or wants to be unpickled.
    """
    import numpy as np

    try:
        with zipfile.ZipFile(file) as archive:
            total = 0
            for entry in archive.infolist():
                if not entry.filename.endswith(".npy"):
                    raise ValueError(f"it holds {entry.filename!r:.80}, which is no array")
                with archive.open(entry) as stream:
                    total += _size(stream, entry)
            if total > _LARGEST_ARRAYS:
                raise ValueError(f"its arrays claim {total:,} bytes")
        with np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
    except (NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        # a compression that is not known, a password, a cut or damaged stream
        raise ValueError(str(error) or type(error).__name__) from None


def _size(stream: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """The bytes of an array by its header, which must be those that the archive says it has."""
    import numpy as np

    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(f"{entry.filename!r:.80} wants to be unpickled")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or stream.tell() + size != entry.file_size:
        raise ValueError(f"{entry.filename!r:.80} is not of the size that its header claims")
    return size
