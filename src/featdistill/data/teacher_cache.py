"""What a teacher says of K fixed views of every image, kept on disk.

    FOLDER/manifest.json                          what the entries are of
    FOLDER/view-0000/shard-00000003.safetensors   256 images' entries, and a checksum of each

An entry's checksum is of its bytes, its address and what the cache is of, so that neither another
image's entry nor another teacher's can be taken for it. A shard is a pure function of what the
manifest says: one that is gone or damaged is made again, to the same bits. It is written under
another name and renamed, so that a kill leaves it whole or not there.

N tokens (1 but for a map), D channels.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from featdistill.core.errors import RunError
from featdistill.core.parsing import parse_json
from featdistill.core.records import write_json
from featdistill.data.decode import BadImage
from featdistill.data.views import Address

SHARD = 256  # images
_FORMAT = 1
_MANIFEST = "manifest.json"
_LONGEST = 1 << 16  # bytes of a header
_HEADER = 1024  # bytes of a shard that are not entries, about
_ROW = 9  # bytes beside each entry: its checksum, and whether its image could be read


@dataclass(frozen=True)
class Shard:
    """The entries of some images, for one view."""

    view: int
    number: int
    images: range


class TeacherCache:
    """Reads and writes entries; the teacher itself is elsewhere.

    It is small and holds nothing open, so that loading processes have copies of it.

    Args:
        folder: where it is, or will be.
        identity: plain values by name: everything that an entry's bits depend on.
        images: how many the source has.
        shape: of an entry, (N, D).
        views: K; an epoch sees view `epoch % K`.
        seed: of the views.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        images: int,
        shape: tuple[int, int],
        views: int,
        seed: int,
    ) -> None:
        self.folder, self.images, self.shape = folder, images, shape
        self.views, self.seed = views, seed
        whole = {**identity, "entry": list(shape), "images": images, "seed of the views": seed}
        # as JSON gives it back
        self.identity: dict[str, Any] = json.loads(json.dumps(whole))
        text = json.dumps(self.identity, sort_keys=True)
        self._hash = hashlib.sha256(text.encode()).hexdigest()[:16]

    def address(self, epoch: int, index: int) -> Address:
        """The address of the view that an epoch sees of an image."""
        return self.seed, epoch % self.views, index

    def bytes_for(self, images: int) -> int:
        """Bytes of so many entries."""
        return images * (2 * self.shape[0] * self.shape[1] + _ROW) + _HEADER * -(-images // SHARD)

    def check(self) -> None:
        """Raise RunError unless this cache is in the folder, or can be put there; writes nothing.

        What a folder holds of another teacher, other images or other views is never touched.
        """
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise RunError(
                f"teacher cache '{folder}' is a file",
                expected="a folder",
                fix="give another --teacher-cache",
            )
        parent = folder
        while not parent.exists():
            parent = parent.parent
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RunError(
                f"cannot write to teacher cache '{folder}' ('{parent}' is not a writable folder)",
                fix="give another --teacher-cache",
            )
        if folder.is_dir():
            self._check_manifest()

    def _check_manifest(self) -> None:
        file = self.folder / _MANIFEST
        if not file.exists():
            strangers = [p.name for p in self.folder.iterdir() if not p.name.startswith("view-")]
            if strangers:
                raise RunError(
                    f"'{self.folder}' is no teacher cache (it holds '{min(strangers)}')",
                    fix="give an empty or a new folder as --teacher-cache",
                )
            return
        try:
            manifest = parse_json(file.read_text(encoding="utf-8"))
            form, before = manifest["format"], dict(manifest["identity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"'{file}' is damaged ({error})",
                fix="delete it: every entry is checked by itself",
            ) from None
        if form != _FORMAT:
            raise RunError(
                f"teacher cache '{self.folder}' has format {form}, not {_FORMAT}",
                fix="give another --teacher-cache",
            )
        differ = [
            f"{name}: {_brief(before.get(name))} there, {_brief(self.identity.get(name))} here"
            for name in sorted({*before, *self.identity})
            if before.get(name) != self.identity.get(name)
        ]
        if differ:
            raise RunError(
                f"the teacher cache '{self.folder}' is of something else ({'; '.join(differ)})",
                fix="give another --teacher-cache, or delete that folder",
            )

    def begin(self) -> None:
        """Make the folder with its manifest; what a kill left half written goes.

        Raises:
            RunError: see `check`; or the disk refuses.
        """
        self.check()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for view in range(self.views):
                (self.folder / f"view-{view:04d}").mkdir(exist_ok=True)
            self._sweep()
            if not (self.folder / _MANIFEST).exists():
                write_json(
                    self.folder / _MANIFEST,
                    {"format": _FORMAT, "shard": SHARD, "identity": self.identity},
                )
        except OSError as error:
            raise self._refused(error) from None

    def _sweep(self) -> None:
        """Delete what processes of this machine that are no more left half written."""
        for path in self.folder.glob("view-*/.*.tmp"):
            *_, host, pid, _ = path.name.rsplit(".", 3)
            if host == _host() and not _alive(int(pid)):
                path.unlink(missing_ok=True)

    def shards(self, views: int) -> list[Shard]:
        """All shards of the first so many views."""
        return [self._shard(v, n) for v in range(views) for n in range(-(-self.images // SHARD))]

    def _shard(self, view: int, number: int) -> Shard:
        start = number * SHARD
        return Shard(view, number, range(start, min(start + SHARD, self.images)))

    def shard_of(self, view: int, index: int) -> Shard:
        """The shard that holds an image's entry."""
        return self._shard(view, index // SHARD)

    def missing(self, views: int) -> list[Shard]:
        """Those of the first so many views that are not there in their full length.

        Their entries are not checked: that is done when they are read.
        """
        shards = self.shards(views)
        if not self.folder.is_dir():
            return shards
        with ThreadPoolExecutor(max_workers=16) as pool:  # a network's latencies overlap
            there = pool.map(self._there, shards)
            return [s for s, whole in zip(shards, there, strict=True) if not whole]

    def _there(self, shard: Shard) -> bool:
        try:
            with safe_open(self.file(shard), framework="pt") as file:
                entries = file.get_slice("entries")
                shape, kind = entries.get_shape(), entries.get_dtype()
                return (
                    (file.metadata() or {}).get("of") == self._hash
                    and tuple(shape) == (len(shard.images), *self.shape)
                    and kind == "BF16"
                    and {"checksums", "readable"} <= set(file.keys())
                )
        except (OSError, SafetensorError):
            return False

    def file(self, shard: Shard) -> Path:
        """Where a shard is."""
        return self.folder / f"view-{shard.view:04d}" / f"shard-{shard.number:08d}.safetensors"

    def read(self, view: int, index: int) -> Tensor | None:
        """An image's entry, (N, D) bf16; None where it is absent or damaged.

        Raises:
            BadImage: there is none, since the image could not be read.
        """
        try:
            entry, checksum, readable = self._row(self.shard_of(view, index), index)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None
        if checksum != self._checksum(view, index, readable, entry):
            return None
        if not readable:
            raise BadImage("it could not be read when the teacher cache was filled")
        return entry

    def _row(self, shard: Shard, index: int) -> tuple[Tensor, int, int]:
        """An image's entry, its checksum, and whether it could be read.

        safetensors' own reader is not asked: of one row it reads all, or maps it, and then loses
        60 bytes of memory a tensor (0.8), gigabytes in a long run.
        """
        row, size = index - shard.images.start, 2 * self.shape[0] * self.shape[1]
        with open(self.file(shard), "rb", buffering=0) as file:
            length = int.from_bytes(_part(file, 8, 0), "little")
            if length > _LONGEST:
                raise ValueError("no header is so long")
            table = parse_json(_part(file, length, 8).decode())

            def cell(name: str, kind: str, wide: int) -> bytes:
                if table[name]["dtype"] != kind:
                    raise ValueError(f"{name} of {table[name]['dtype']}")
                return _part(
                    file, wide, 8 + length + int(table[name]["data_offsets"][0]) + row * wide
                )

            entry = torch.frombuffer(bytearray(cell("entries", "BF16", size)), dtype=torch.bfloat16)
            checksum = int.from_bytes(cell("checksums", "I64", 8), "little")
            return entry.view(self.shape), checksum, cell("readable", "U8", 1)[0]

    def write(self, shard: Shard, entries: Tensor, readable: list[bool]) -> None:
        """Write a shard.

        Args:
            entries: (images, N, D) bf16 on the CPU.
            readable: whether each image was; what stands for one that was not never comes out.

        Raises:
            RunError: the disk refuses.
        """
        assert entries.dtype == torch.bfloat16
        assert entries.shape == (len(shard.images), *self.shape)
        checksums = [
            self._checksum(shard.view, index, int(good), entry)
            for index, good, entry in zip(shard.images, readable, entries, strict=True)
        ]
        final = self.file(shard)
        temporary = final.with_name(f".{final.stem}.{_host()}.{os.getpid()}.tmp")
        tensors = {
            "entries": entries.contiguous(),
            "checksums": torch.tensor(checksums),
            "readable": torch.tensor(readable, dtype=torch.uint8),
        }
        try:
            save_file(tensors, temporary, metadata={"of": self._hash})
            os.replace(temporary, final)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise self._refused(error) from None

    def _checksum(self, view: int, index: int, readable: int, entry: Tensor) -> int:
        start = zlib.crc32(f"{self._hash}/{view}/{index}/{readable}".encode())
        return zlib.crc32(entry.contiguous().view(torch.uint8).numpy().data, start)

    def free(self) -> int:
        """Bytes that are free where it is, or will be."""
        folder = self.folder.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def _refused(self, error: Exception) -> RunError:
        reason = getattr(error, "strerror", None) or error
        return RunError(
            f"cannot write to teacher cache '{self.folder}' ({reason})",
            fix="make room, then go on with the same command and --resume",
        )


def _part(file: FileIO, size: int, start: int) -> bytes:
    """So many bytes of a file from a place on. Raises ValueError if it has fewer."""
    found = b""
    while len(found) < size:
        more = os.pread(file.fileno(), size - len(found), start + len(found))
        if not more:
            raise ValueError("the file is cut")
        found += more
    return found


def _brief(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
