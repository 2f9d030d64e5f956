"""A checkpoint file as a tree of tensors: whatever its format, without running any code of it."""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.models.checkpoints.archive import UnsafeArchive, is_archive, read_archive

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".pyth", ".model")
_LARGEST_HEADER = 100 << 20  # bytes; safetensors' own limit


class _Inert:
    """Stands in for settings that projects pickle beside their weights; it does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# Settings, scalars and paths that official files hold; their contents are of no use here. torch
# fills no dictionary but its own kinds, so that a yacs node has to be one of those.
_SETTINGS: list[Any] = [
    (OrderedDict, "yacs.config.CfgNode"),
    (_Inert, "argparse.Namespace"),
    (_Inert, "pathlib.PosixPath"),
    (_Inert, "pathlib._local.PosixPath"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
    (_Inert, "numpy.dtype"),
]
_DEEPEST = 8  # levels of dictionaries; the files of real projects have three


def read_tree(path: Path) -> dict[str, Any]:
    """A checkpoint file's nested dictionaries, with tensors on the CPU.

    `.safetensors`, `torch.save` files (opened with `weights_only=True`, so that no code of theirs
    runs) and TorchScript archives (read as data).

    Raises:
        ModelError: absent, truncated, damaged, refused, or something else than a checkpoint.
    """
    try:
        if not path.is_file():
            raise ModelError(f"no checkpoint file at '{path}'")
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ModelError(f"cannot read '{path}' ({error.strerror or error})") from None
    _refuse_strangers(path, head)
    try:
        tree = _tree(path, head)
    except UnsafeArchive as error:
        raise _refused(path, str(error)) from None
    except ModelError:
        raise
    except Exception as error:  # torch and zipfile raise whatever a damaged file provokes
        raise _unreadable(path, head, error) from None
    for name, value in tensors_of(path, tree):
        # a view can claim terabytes of a few bytes; a checkpoint's tensors own what they show
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ModelError(f"'{path}' is refused: its tensor '{name}' is larger than its data")
    return tree


def _tree(path: Path, head: bytes) -> dict[str, Any]:
    # a header's length may begin with the bytes of a zip or a pickle, but it ends in zeros
    if head[4:9] == b"\0\0\0\0{" or (
        path.suffix.lower() == ".safetensors" and not head.startswith((b"PK", b"\x80"))
    ):
        return dict(_safetensors(path, head))
    if zipfile.is_zipfile(path) and is_archive(path):
        return dict(read_archive(path))
    value = _pickled(path, zipped=head.startswith(b"PK"))
    if not isinstance(value, Mapping):
        raise ModelError(
            f"'{path}' is not a checkpoint: it holds no named tensors, but a {type(value).__name__}"
        )
    return {str(k): v for k, v in value.items()}


def tensors_of(
    path: Path, tree: Mapping[str, Any], before: str = "", depth: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dictionaries, with their places.

    Raises:
        ModelError: the dictionaries are nested deeper than any checkpoint's, or hold themselves.
    """
    if depth > _DEEPEST:
        raise ModelError(f"'{path}' is not a checkpoint: its dictionaries are nested without end")
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{before}{key}", value
        elif isinstance(value, Mapping):
            yield from tensors_of(path, value, f"{before}{key}/", depth + 1)


def _refuse_strangers(path: Path, head: bytes) -> None:
    if not head:
        raise ModelError(f"'{path}' is not a checkpoint: the file is empty", fix="copy it again")
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"'{path}' is a Git LFS pointer, not the file itself", fix="fetch it: git lfs pull"
        )
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise ModelError(f"'{path}' is a web page, not a checkpoint", fix="download it again")


def _safetensors(path: Path, head: bytes) -> dict[str, Tensor]:
    # looked at before the library maps the file: a hostile length costs nothing this way
    header, size = int.from_bytes(head[:8], "little"), path.stat().st_size
    if len(head) < 8 or header > _LARGEST_HEADER or not head[8:9] == b"{":
        raise ModelError(f"'{path}' is not a checkpoint: it has no safetensors header")
    if 8 + header > size:
        raise ModelError(
            f"'{path}' is not a checkpoint that can be read: it is truncated (its header alone has "
            f"{header:,} bytes, the file {size:,})",
            fix="download it again",
        )
    return load_file(path)


def _pickled(path: Path, *, zipped: bool) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with torch.serialization.safe_globals(_SETTINGS):
        if path.suffix.lower() != ".safetensors":
            return torch.load(path, mmap=zipped, **options)
        with open(path, "rb") as file:  # by its name torch would take it for safetensors
            return torch.load(file, **options)


_TRUNCATED = (
    "central directory",
    "unexpected eof",
    "ran out of input",
    "incomplete metadata",
    "not fully covered",
    "corrupted",
    "unexpected pos",
    "eof",
)


def _unreadable(path: Path, head: bytes, error: Exception) -> ModelError:
    line = " ".join(str(error).split())
    wanted = re.search(r"GLOBAL ([\w.]+)", line)
    if wanted:
        return _refused(path, f"it wants to call {wanted[1]}")
    if "Weights only load failed" in line and head.startswith((b"\x80", b"PK")):
        return _refused(path, "it is a pickle of more than tensors")
    if isinstance(error, EOFError) or any(sign in line.lower() for sign in _TRUNCATED):
        return ModelError(
            f"'{path}' is not a checkpoint that can be read: it is truncated or damaged "
            f"({line[:100] or type(error).__name__})",
            fix="download or copy it again",
        )
    if "magic number" in line:
        return ModelError(f"'{path}' is not a checkpoint: a pickle that torch.save did not write")
    reason = line.split(". ")[0][:160] or type(error).__name__
    if isinstance(error, SafetensorError) or head.startswith((b"PK", b"\x80")):
        return ModelError(
            f"'{path}' is not a checkpoint that can be read: it is damaged ({reason})",
            fix="download or copy it again",
        )
    return ModelError(
        f"'{path}' is not a checkpoint: it is no zip, no pickle and no safetensors file",
        expected="a .pth, .pt or .bin of tensors, or .safetensors",
    )


def _refused(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"'{path}' is refused: {reason}, and nothing in a checkpoint is run here",
        fix="save its tensors alone, with safetensors or torch.save(model.state_dict(), ...)",
    )
