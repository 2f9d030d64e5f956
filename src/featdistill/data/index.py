"""The list of image files below a folder: scanned by threads, cached, and checked before use."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from featdistill.core.errors import DataError
from featdistill.core.parsing import parse_json

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".jp2")
)
_VERSION = 1


@dataclass(frozen=True)
class Index:
    """Image files below `root`, as sorted relative POSIX paths."""

    root: Path
    files: tuple[str, ...]


def index_folder(root: Path, *, cache: Path | None = None) -> Index:
    """The image files below a folder, at any depth.

    A million files in a thousand folders are listed by threads once; later calls only stat the
    folders, since adding or removing a file changes its folder's modification time.

    Args:
        root: the folder.
        cache: folder for cached listings; `~/.cache/featdistill/index` by default.

    Raises:
        DataError: a folder cannot be read.
    """
    root = root.resolve()
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache if cache is not None else home / "featdistill" / "index"
    file = folder / f"{hashlib.sha256(str(root).encode()).hexdigest()[:24]}.txt"
    known = _read_cache(file, root)
    if known is not None:
        return Index(root, known)
    files, folders = _scan(root)
    _write_cache(file, root, files, folders)
    return Index(root, files)


@dataclass(frozen=True)
class _Listing:
    path: str
    modified: int
    files: list[str]
    folders: list[str]
    above: frozenset[tuple[int, int]]


def _scan(root: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """All image files, and the modification time (ns) of every folder."""
    files: list[str] = []
    folders: dict[str, int] = {}
    with ThreadPoolExecutor(max_workers=min(16, 4 * (os.cpu_count() or 1))) as pool:
        pending: set[Future[_Listing | None]] = {pool.submit(_list, root, "", frozenset())}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                listing = future.result()
                if listing is None:
                    continue
                folders[listing.path] = listing.modified
                files.extend(listing.files)
                pending |= {pool.submit(_list, root, sub, listing.above) for sub in listing.folders}
    return tuple(sorted(files)), folders


def _list(root: Path, path: str, above: frozenset[tuple[int, int]]) -> _Listing | None:
    where = root / path
    prefix = f"{path}/" if path else ""
    try:
        status = os.stat(where)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link back to a folder above
            return None
        files, folders = [], []
        with os.scandir(where) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(prefix + entry.name)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    files.append(prefix + entry.name)
    except OSError as error:
        raise DataError(
            f"cannot read the folder '{where}' ({error.strerror or error})",
            fix="make it readable, or leave it out",
        ) from None
    return _Listing(path, status.st_mtime_ns, files, folders, above | {here})


def _read_cache(file: Path, root: Path) -> tuple[str, ...] | None:
    """The cached listing if every folder is as it was; None otherwise."""
    try:
        header, _, body = file.read_text(encoding="utf-8").partition("\n")
        meta = parse_json(header)
        if meta["version"] != _VERSION or meta["root"] != str(root):
            return None
        if any(os.stat(root / f).st_mtime_ns != time for f, time in meta["folders"].items()):
            return None
        files = tuple(body.split("\n")) if body else ()
        return files if len(files) == meta["count"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_cache(file: Path, root: Path, files: tuple[str, ...], folders: dict[str, int]) -> None:
    if any("\n" in name for name in files):
        return
    meta = {"version": _VERSION, "root": str(root), "count": len(files), "folders": folders}
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(meta) + "\n" + "\n".join(files), encoding="utf-8")
        os.replace(temporary, file)
    except (OSError, UnicodeEncodeError):  # no cache is a slower next start, not a failure
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
