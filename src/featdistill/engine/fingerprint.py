"""What identifies a run's images, so that it is not continued on others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from featdistill.core.errors import DataError
from featdistill.core.seeds import generator
from featdistill.data.decode import BadImage
from featdistill.data.kept import Kept
from featdistill.data.masks import PairSource
from featdistill.data.sources import FileSource, Relabelled, Scaled, Source, Subset

_SAMPLE = 64
_MEANING = {
    "names": "files were added, removed or renamed",
    "sizes": "files were replaced by others of their name",
    "labels": "labels changed",
    "pixels": "images look otherwise",
}


def fingerprint(source: Source) -> dict[str, Any]:
    """What a source's images are known by; a million files cost seconds (one `stat` each).

    Returns:
        `images`, their number, and short hashes: of `names`, of the files' `sizes` (where they are
        files), of `labels` (if any), and of the `pixels` of a fixed sample of 64 images. Another
        image of the same name and size is seen if the sample has it.
    """
    count = len(source)
    found: dict[str, Any] = {
        "images": count,
        "names": _hash(source.identify(i) for i in range(count)),
        "pixels": _hash(_pixels(source, i) for i in _sample(count)),
    }
    sizes = _sizes(source)
    if sizes is not None:
        found["sizes"] = _hash([sizes.tobytes()])
    if source.labels is not None:
        found["labels"] = _hash([np.asarray(source.labels, np.int64).tobytes()])
    return found


def check_data(manifest: Mapping[str, Any], now: Mapping[str, Any], source: Source) -> None:
    """Raise DataError if a run's images are not those that its checkpoint saw, and say how."""
    before = manifest.get("data")
    if before is None:  # of an earlier version, which knew their number alone
        before = {"images": manifest.get("data_images")}
    if before["images"] != now["images"]:
        raise DataError(
            f"the run began with {before['images']} images of '{source.name}', now there are "
            f"{now['images']}",
            fix="put the data back, or begin a new run",
        )
    changed = [
        meaning
        for name, meaning in _MEANING.items()
        if name in before and before[name] != now.get(name)
    ]
    if changed:
        raise DataError(
            f"the images of '{source.name}' are not those that the run began with "
            f"({'; '.join(changed)})",
            fix="put the data back, or begin a new run",
        )


def _hash(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]


def _sample(count: int) -> list[int]:
    if count <= _SAMPLE:
        return list(range(count))
    chosen = generator("fingerprint", count).choice(count, _SAMPLE, replace=False)
    return sorted(int(i) for i in chosen)


def _pixels(source: Source, index: int) -> bytes:
    try:
        image = source.read(index)
        mask = source.masks.data(source.place(index)) if isinstance(source, PairSource) else b""
    except BadImage:
        return b"unreadable"
    return mask + repr(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()


def _sizes(source: Source) -> np.ndarray | None:
    """Bytes of each file; -1 where it cannot be asked. None for what is not files."""
    if isinstance(source, PairSource):
        inner = _sizes(source.images)
        return inner if inner is None or source.chosen is None else inner[list(source.chosen)]
    if isinstance(source, Relabelled | Scaled | Kept):
        return _sizes(source.source)
    if isinstance(source, Subset):
        inner = _sizes(source.source)
        return None if inner is None else inner[source.chosen]
    if not isinstance(source, FileSource):
        return None

    def size(name: str) -> int:
        try:
            return (source.root / name).stat().st_size
        except OSError:
            return -1

    with ThreadPoolExecutor(max_workers=16) as pool:  # a network's latencies overlap
        return np.fromiter(pool.map(size, source.files, chunksize=1024), np.int64)
