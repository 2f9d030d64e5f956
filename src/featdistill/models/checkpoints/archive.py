"""TorchScript archives (`torch.jit.save`) read as data: tensors out, no code in.

Such an archive is a zip of `NAME/data.pkl` (a pickled tree of modules that refers to tensors),
`NAME/data/KEY` (the tensors' bytes) and `NAME/code/` (never opened here).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LARGEST_PICKLE = 64 << 20  # bytes; CLIP's is 0.1 MB


class UnsafeArchive(Exception):
    """The archive asks for something that is not data."""


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, by its contents."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any("/code/" in name or name.endswith("/constants.pkl") for name in file.namelist())


def read_archive(path: Path) -> dict[str, Tensor]:
    """The named tensors of a TorchScript archive, on the CPU.

    Raises:
        UnsafeArchive: its pickle wants anything but modules, tensors and plain values.
        OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile, ...: it is damaged.
    """
    with zipfile.ZipFile(path) as file:
        entry = next(n for n in file.namelist() if n.endswith("/data.pkl"))
        if file.getinfo(entry).file_size > _LARGEST_PICKLE:
            raise UnsafeArchive(f"its {entry} is larger than any model's structure")
        with file.open(entry) as stream:
            root = _Reader(stream, file, entry.removesuffix("data.pkl")).load()
    return dict(_walk(root, ""))


class _Module:
    """Stands in for a scripted module: holds its attributes, does nothing."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class _Stored:
    """A tensor's bytes, still in the archive."""

    key: str
    dtype: torch.dtype
    elements: int


class _Reader(pickle._Unpickler):
    """An unpickler that knows modules, tensors and nothing else.

    Python's own, since C's gives memory for whatever index a file says it remembers something at.
    """

    def __init__(self, stream: Any, file: zipfile.ZipFile, folder: str) -> None:
        super().__init__(stream)
        self._file, self._folder = file, folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name.rpartition(".")[2] or "Module", (_Module,), {})
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # lists of numbers, and type tags
            return lambda value, *_: value
        if (module, name) == ("torch", "device"):
            return str
        raise UnsafeArchive(f"it wants to call {module}.{name}")

    def persistent_load(self, reference: Any) -> _Stored:
        kind, dtype, key, _device, elements = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise UnsafeArchive(f"it refers to {reference!r:.80}")
        return _Stored(str(key), dtype, int(elements))

    def _tensor(
        self, stored: _Stored, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        data = self._storages.get(stored.key)
        if data is None:
            data = self._storages[stored.key] = self._read(stored)
        # as_strided refuses what lies outside the storage
        return torch.as_strided(data, size, stride, offset)

    def _read(self, stored: _Stored) -> Tensor:
        info = self._file.getinfo(f"{self._folder}data/{stored.key}")
        wanted = stored.elements * stored.dtype.itemsize
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != wanted:
            raise ValueError(f"tensor {stored.key} has {info.file_size} bytes instead of {wanted}")
        if not wanted:
            return torch.empty(0, dtype=stored.dtype)
        return torch.frombuffer(bytearray(self._file.read(info)), dtype=stored.dtype)


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    state = getattr(value, "state", None) if isinstance(value, _Module) else value
    if isinstance(state, dict):
        for key, inner in state.items():
            yield from _walk(inner, f"{name}.{key}" if name else str(key))
