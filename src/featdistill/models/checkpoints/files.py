"""A checkpoint file as a tree of tensors: whatever its format, without running any code of it."""

from __future__ import annotations

import re
import warnings
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
        _check_plain(path, name, value)
    return tree


def _check_plain(path: Path, name: str, value: Tensor) -> None:
    """Raise ModelError for a tensor that is not a block of numbers of its own."""
    kind = (
        "sparse"
        if value.layout != torch.strided
        else "quantised"
        if value.is_quantized
        else "without data (of the meta device)"
        if value.is_meta
        else None
    )
    if kind is not None:
        raise ModelError(
            f"'{path}' is refused: its tensor '{name}' is {kind}",
            expected="dense tensors of numbers",
            fix="save the model's weights as they were before they were packed",
        )
    # a view can claim terabytes of a few bytes; a checkpoint's tensors own what they show
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ModelError(f"'{path}' is refused: its tensor '{name}' is larger than its data")


def _tree(path: Path, head: bytes) -> dict[str, Any]:
    # a header's length may begin with the bytes of a zip or a pickle, but it ends in zeros
    if head[4:9] == b"\0\0\0\0{" or (
        path.suffix.lower() == ".safetensors" and not head.startswith((b"PK", b"\x80"))
    ):
        return dict(_safetensors(path, head))
    if zipfile.is_zipfile(path):
        if is_archive(path):
            return dict(read_archive(path))
        _refuse_zip(path)
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


# How other things begin that are taken for checkpoints: what they are, and what to do.
_STRANGERS = {
    b"version https://git-lfs": (
        "a Git LFS pointer, not the file itself",
        "fetch it: git lfs pull",
    ),
    b"<!doc": ("a web page, not a checkpoint", "download it again"),
    b"<html": ("a web page, not a checkpoint", "download it again"),
    b"<?xml": ("a server's message (XML), not a checkpoint", "download it again"),
    b"{": ("text (JSON), not a checkpoint", "download it again, or give the file with weights"),
    b"\x1f\x8b": ("compressed (gzip)", "unpack it and give the checkpoint inside"),
    b"\x89hdf": ("an HDF5 file, as Keras writes it", "give the project's PyTorch weights"),
    b"\x93numpy": ("a NumPy array, not a checkpoint", "give the project's PyTorch weights"),
}
_TENSORFLOW = re.compile(r"\.index$|\.data-\d+-of-\d+$|\.meta$")


def _refuse_strangers(path: Path, head: bytes) -> None:
    if not head:
        raise ModelError(f"'{path}' is not a checkpoint: the file is empty", fix="copy it again")
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, (what, fix) in _STRANGERS.items():
        if begins.startswith(start):
            raise ModelError(f"'{path}' is {what}", fix=fix)


def _refuse_zip(path: Path) -> None:
    """Raise ModelError for a zip that holds other things than torch.save's."""
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return
    if any(name.endswith(".npy") for name in names):
        raise ModelError(
            f"'{path}' is an archive of NumPy arrays, not a checkpoint of PyTorch's",
            fix="if timm has these weights, name them: timm/NAME.TAG",
        )
    held = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    raise ModelError(
        f"'{path}' is a zip that torch.save did not write{held}",
        fix="unpack it and give the checkpoint inside",
    )


def _safetensors(path: Path, head: bytes) -> dict[str, Tensor]:
    # looked at before the library maps the file: a hostile length costs nothing this way
    header, size = int.from_bytes(head[:8], "little"), path.stat().st_size
    if header > _LARGEST_HEADER or head[8:9] not in (b"{", b""):
        raise ModelError(f"'{path}' is not a checkpoint: it has no safetensors header")
    if len(head) < 9:
        raise ModelError(
            f"'{path}' is not a checkpoint that can be read: it is truncated (to {size} bytes)",
            fix="download it again",
        )
    if 8 + header > size:
        raise ModelError(
            f"'{path}' is not a checkpoint that can be read: it is truncated (its header alone has "
            f"{header:,} bytes, the file {size:,})",
            fix="download it again",
        )
    return load_file(path)


def _pickled(path: Path, *, zipped: bool) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with torch.serialization.safe_globals(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols and sparse tensors
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
            f"({line.split('. ')[0][:160] or type(error).__name__})",
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
        fix="it has a name as TensorFlow's: give the project's PyTorch weights"
        if _TENSORFLOW.search(path.name)
        else None,
    )


def _refused(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"'{path}' is refused: {reason}, and nothing in a checkpoint is run here",
        fix="save its tensors alone, with safetensors or torch.save(model.state_dict(), ...)",
    )
