"""Decoded images on disk: read instead of decoded, with whatever is damaged decoded anew.

An entry is a folder: `pixels.bin`, every image's bytes (3, height, width) one after the other;
`index.bin`, each one's height, width and checksum; and `manifest.json`, which is written last and
names the images that it was made of. An image that could not be read has no bytes: it is tried
again whenever it is wanted, since a disk or a network may have been at fault.

What another program left there is never more than pixels: sizes are checked before anything is
read, and an image whose checksum is another one comes from its source.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featdistill.core.errors import DataError
from featdistill.core.parsing import parse_json
from featdistill.core.records import sync, write_json
from featdistill.data.decode import MOST_PIXELS
from featdistill.data.kept import Block, Kept, decoded, estimate, in_words, read_shrunk
from featdistill.data.sources import (
    ArraySource,
    ArrowSource,
    FileSource,
    Source,
    Subset,
)

_VERSION = 1
_ROW = np.dtype([("height", "<i4"), ("width", "<i4"), ("crc", "<u4")])
_MOST_MANIFEST = 1 << 20  # bytes; one has a few hundred
_TABLE = 2 << 30  # bytes of encoded images that are quickly read
_MARGIN = 1.02  # of a sampled size, for the room that it will take
_TAKEN = (errno.EACCES, errno.EAGAIN)
_DAMAGED = "damaged"

Tell = Callable[[str], None]


class DiskImages(Kept):
    """A source whose decoded images are read from an entry.

    Args:
        source: what they are the images of, and where those come from that are not whole.
        folder: the entry.
        index: rows of `_ROW`.
        short_side: of the images that were larger.
    """

    _handle: int | None = None

    def __init__(
        self, source: Source, *, folder: Path, index: np.ndarray, short_side: int | None
    ) -> None:
        super().__init__(source)
        self.folder, self.short_side = folder, short_side
        self._index, self._ends = index, _ends(index)
        self._bytes(0, 0)  # opened now: another entry may take this one's place

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def read(self, index: int) -> Tensor:
        row, end = self._index[index], int(self._ends[index])
        shape = 3, int(row["height"]), int(row["width"])
        size = shape[0] * shape[1] * shape[2]
        if size:
            # not a memory map, which kills its process where another cuts the file short
            data = self._bytes(size, end - size)
            if len(data) == size and zlib.crc32(data) == row["crc"]:
                return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)
            with suppress(OSError):  # for whoever opens it next, to write it anew
                (self.folder / _DAMAGED).touch()
        return read_shrunk(self.source, index, self.short_side)

    def _bytes(self, size: int, start: int) -> bytes:
        try:
            if self._handle is None:
                self._handle = os.open(self.folder / "pixels.bin", os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._handle, size, start)
        except OSError:
            return b""

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)


def on_disk(
    source: Source,
    *,
    folder: Path,
    identity: Mapping[str, Any],
    short_side: int | None,
    workers: int | None,
    tell: Tell,
    progress: Callable[[int, int], None],
) -> DiskImages:
    """A source's decoded images on disk, written now unless they are there.

    Several processes may call it at once: one writes, the others wait. What a killed one had
    written is gone on with.

    Args:
        folder: of all entries.
        identity: what the source's images are known by (JSON-ready); with another one an entry is
            written anew.
        short_side: of larger images, which become smaller; None: all stay as they are.
        workers: loading processes; None: by the cores.
        tell: is told what is done, and how much will be written before it is.
        progress: is told how many images of how many are done.

    Raises:
        DataError: the folder cannot be written, or has too little room.
    """
    head = _head(identity, short_side, len(source))
    entry = folder / _name(source, short_side)
    index, trouble = _open(entry, head)
    if index is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(entry.with_suffix(".lock"), tell) as alone:
                index, trouble = _open(entry, head)
                if index is None:
                    # where nobody can wait, each process writes for itself
                    part = entry.with_suffix(".part" if alone else f".{os.getpid()}.part")
                    if trouble:
                        tell(f"the cache '{entry}' is written anew: {trouble}")
                    _write(source, part, head, short_side, workers, tell, progress)
                    _put(part, entry)
                    index, trouble = _open(entry, head)
        except OSError as error:
            raise _refused(folder, error) from None
    if index is None:
        raise DataError(
            f"the cache '{entry}' cannot be read back as it was written ({trouble})",
            fix="look at that disk, or give another --data.cache_folder",
        )
    tell(f"decoded images: {in_words(int(_ends(index)[-1]))} in '{entry}'")
    return DiskImages(source, folder=entry, index=index, short_side=short_side)


def _refused(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write the cache in '{folder}' ({error.strerror or error})",
        fix="make room, or give another --data.cache_folder",
    )


def _name(source: Source, short_side: int | None) -> str:
    """An entry's name: where the images are, so that changed ones take the old ones' place."""
    digest = hashlib.sha256(repr(short_side).encode())
    while (inner := getattr(source, "source", None)) is not None:
        if isinstance(source, Subset):
            digest.update(np.asarray(source.chosen, np.int64).tobytes())
        source = inner
    root = getattr(source, "root", None)
    where = source.name if root is None else f"{Path(root).resolve()}\0{Path(source.name).name}"
    digest.update(f"{type(source).__name__}\0{where}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:24]


def stamp(source: Source) -> int | None:
    """What tells changed images apart where a fingerprint's sample does not.

    Of files, their modification times; of a table up to 2 GiB, its bytes. None: nothing is known.
    """
    if isinstance(source, Subset):
        if not isinstance(source.source, FileSource):
            return stamp(source.source)
        files = [source.source.files[i] for i in source.chosen.tolist()]
        return stamp(FileSource(source.name, source.source.root, files))
    if (inner := getattr(source, "source", None)) is not None:
        return stamp(inner)
    if isinstance(source, ArraySource):
        return zlib.crc32(source.images.contiguous().numpy().data)
    if isinstance(source, ArrowSource):
        return source.checksum() if source.encoded_bytes <= _TABLE else None
    if not isinstance(source, FileSource):
        return None

    def changed(name: str) -> int:
        try:
            return (source.root / name).stat().st_mtime_ns
        except OSError:
            return -1

    with ThreadPoolExecutor(max_workers=16) as pool:  # a network's latencies overlap
        times = np.fromiter(pool.map(changed, source.files, chunksize=1024), np.int64)
    return zlib.crc32(times.tobytes())


def _head(identity: Mapping[str, Any], short_side: int | None, images: int) -> dict[str, Any]:
    """What an entry must have been made of."""
    versions = {name: metadata.version(name) for name in ("pillow", "simplejpeg")}
    if short_side is not None:
        versions["torch"] = torch.__version__  # which shrinks them
    head = {
        "version": _VERSION,
        "decoder": versions,
        "short_side": short_side,
        "images": images,
        "identity": dict(identity),
    }
    return dict(parse_json(json.dumps(head)))


# --- reading an entry


def _open(entry: Path, head: Mapping[str, Any]) -> tuple[np.ndarray | None, str]:
    """An entry's index if it is whole and of these images; or else why not, nothing if absent."""
    try:
        manifest = parse_json(_small_file(entry / "manifest.json", _MOST_MANIFEST))
        if not isinstance(manifest, dict):
            return None, "its manifest is no manifest"
        stale = [key for key, value in head.items() if manifest.get(key) != value]
        if stale:
            return None, "the images or how they are read changed"
        if (entry / _DAMAGED).exists():
            return None, "an image in it was damaged"
        count = int(head["images"])
        rows = _small_file(entry / "index.bin", count * _ROW.itemsize)
        if hashlib.sha256(rows).hexdigest() != manifest.get("index"):
            return None, "its index is damaged"
        index = np.frombuffer(rows, _ROW)
        pixels = os.stat(entry / "pixels.bin")
        if not stat.S_ISREG(pixels.st_mode) or not _possible(index, count, pixels.st_size):
            return None, "its pixels are not of the size that its index says"
        return index, ""
    except FileNotFoundError:
        return None, "" if not entry.exists() else "a file of it is missing"
    except (OSError, ValueError) as error:
        return None, str(error)


def _small_file(file: Path, most: int) -> bytes:
    """A plain file's bytes; ValueError if it is none, or larger than it can be."""
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(handle, "rb") as opened:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise ValueError(f"'{file.name}' is not what was written")
        return opened.read(most)


def _possible(index: np.ndarray, count: int, size: int) -> bool:
    """Whether rows can be an index of so many images in so many bytes."""
    heights, widths = (index[side].astype(np.int64) for side in ("height", "width"))
    return bool(
        len(index) == count
        and (heights >= 0).all()
        and (widths >= 0).all()
        and (heights * widths <= MOST_PIXELS).all()
        and int((3 * heights * widths).sum()) == size
    )


def _ends(index: np.ndarray) -> np.ndarray:
    """Where each image's bytes end."""
    return np.cumsum(3 * index["height"].astype(np.int64) * index["width"])


# --- writing one


@contextmanager
def _alone(file: Path, tell: Tell) -> Iterator[bool]:
    """Hold a lock, which ends with its process; False where the file system knows none."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _TAKEN:
                yield False
                return
            tell(f"another process writes '{file.with_suffix('')}': waiting for it")
            fcntl.lockf(handle, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(handle)


def _write(
    source: Source,
    part: Path,
    head: Mapping[str, Any],
    short_side: int | None,
    workers: int | None,
    tell: Tell,
    progress: Callable[[int, int], None],
) -> None:
    """Write an entry beside its place."""
    count, guess = len(source), estimate(source, short_side)
    start = _done(part, head)
    _check_room(source, part.parent, count - start, guess.pixels * (count - start) // count, tell)
    if not start:
        _remove(part)
        part.mkdir()
        write_json(part / "begun.json", head)
    blocks = decoded(
        source,
        short_side=short_side,
        mean_bytes=guess.pixels // count,
        workers=workers,
        start=start,
    )
    try:
        with open(part / "pixels.bin", "ab") as pixels, open(part / "index.bin", "ab") as index:
            for block in blocks:
                rows = _rows(block)
                pixels.write(block.pixels.numpy().data)
                pixels.flush()  # never an index of bytes that are not there
                index.write(rows.tobytes())
                index.flush()
                start += len(rows)
                progress(start, count)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # its room is wanted
        raise
    for name in ("pixels.bin", "index.bin"):
        sync(part / name)
    digest = hashlib.sha256((part / "index.bin").read_bytes()).hexdigest()
    write_json(part / "manifest.json", {**head, "index": digest})
    (part / "begun.json").unlink()
    sync(part)


def _check_room(source: Source, folder: Path, images: int, size: int, tell: Tell) -> None:
    """Say what will be written; DataError if there is no room for it."""
    free = shutil.disk_usage(folder).free
    if size * _MARGIN + images * _ROW.itemsize > free:
        raise DataError(
            f"the decoded images of '{source.name}' take about {in_words(size)} in '{folder}', "
            f"where {in_words(free)} are free",
            fix="make room, or give another --data.cache_folder or --data.cache_short_side N",
        )
    tell(
        f"decoding {images:,} of {len(source):,} images into '{folder}': about {in_words(size)}, "
        f"{in_words(free)} free"
    )


def _done(part: Path, head: Mapping[str, Any]) -> int:
    """How many images a killed process left of the same entry; what else it left is cut off."""
    try:
        same = parse_json(_small_file(part / "begun.json", _MOST_MANIFEST)) == head
        rows = _small_file(part / "index.bin", int(head["images"]) * _ROW.itemsize)
        index = np.frombuffer(rows[: len(rows) // _ROW.itemsize * _ROW.itemsize], _ROW)
        size = int(_ends(index)[-1]) if len(index) else 0
        whole = _possible(index, len(index), size)
        if same and whole and (part / "pixels.bin").stat().st_size >= size:
            os.truncate(part / "pixels.bin", size)
            os.truncate(part / "index.bin", index.nbytes)
            return len(index)
    except (OSError, ValueError):
        pass
    return 0


def _rows(block: Block) -> np.ndarray:
    """The index of a block."""
    rows, start = np.zeros(len(block.sizes), _ROW), 0
    rows["height"], rows["width"] = block.sizes.T.numpy()
    pixels, sums = block.pixels.numpy().data, []
    for size in (3 * block.sizes.prod(dim=1)).tolist():
        sums.append(zlib.crc32(pixels[start : start + size]))
        start += size
    rows["crc"] = sums
    return rows


def _put(part: Path, entry: Path) -> None:
    """Put a whole entry in its place; what was there goes only then."""
    for old in entry.parent.glob(f"{entry.name}.*.old"):  # of a process that was killed here
        shutil.rmtree(old, ignore_errors=True)
    old = entry.with_suffix(f".{os.getpid()}.old")
    with suppress(FileNotFoundError):
        os.replace(entry, old)
    os.replace(part, entry)
    sync(entry.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder, or whatever else is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
