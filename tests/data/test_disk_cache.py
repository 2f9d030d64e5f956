"""Decoded images on disk: the source's own, whatever became of the files."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from torch import Tensor

from featdistill.core.errors import DataError
from featdistill.data import disk_cache
from featdistill.data.decode import BadImage
from featdistill.data.disk_cache import DiskImages, on_disk, stamp
from featdistill.data.sources import ArraySource, ArrowSource, FileSource, Relabelled, Subset

N = 30
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Photos(ArraySource):
    """Images of two sizes; what is read is noted, and the bad ones cannot be."""

    bad: set[int] = field(default_factory=set)
    log: Path | None = None

    def read(self, index: int) -> Tensor:
        if self.log is not None:
            with open(self.log, "a", encoding="ascii") as log:
                log.write(f"{index}\n")
        if index in self.bad:
            raise BadImage("bad bytes")
        return super().read(index)[:, : 9 - index % 2].contiguous()

    def reads(self) -> list[int]:
        """What was read since the last call."""
        assert self.log is not None
        found = [int(line) for line in self.log.read_text().split()] if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return found


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 3, 9, 8), np.uint8))
    return Photos("made", pixels, np.arange(N) % 3, ("a", "b", "c"), {4}, tmp_path / "reads")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(source: Any, folder: Path, said: list[str] | None = None, **changes: Any) -> DiskImages:
    options: dict[str, Any] = {
        "identity": {"names": "x"},
        "short_side": None,
        "workers": 0,
        "tell": (said if said is not None else []).append,
        "progress": lambda done, total: None,
    }
    return on_disk(source, folder=folder, **{**options, **changes})


def check(kept: DiskImages, photos: Photos) -> None:
    """Every image is the source's."""
    for index in range(N):
        if index in photos.bad:
            with pytest.raises(BadImage, match="bad bytes"):
                kept.read(index)
        else:
            assert torch.equal(kept.read(index), photos.read(index))


def entry_of(folder: Path) -> Path:
    [entry] = [path for path in folder.iterdir() if path.suffix != ".lock"]
    return entry


def written(photos: Photos, folder: Path) -> Path:
    """An entry of `photos`, just written."""
    opened(photos, folder)
    photos.reads()
    return entry_of(folder)


def test_images_are_decoded_once(photos: Photos, folder: Path) -> None:
    said: list[str] = []
    kept = opened(photos, folder, said)
    check(kept, photos)
    assert kept.labels is photos.labels
    assert (kept.name, kept.classes, len(kept)) == (photos.name, photos.classes, N)
    assert "decoding 30 of 30 images into" in said[0], "the size is told before"
    assert "about 6.0 KiB" in said[0]
    photos.reads()
    again = opened(photos, folder, said)
    assert photos.reads() == []
    for index in set(range(N)) - photos.bad:
        again.read(index)
    assert photos.reads() == []
    assert len(said) == 3
    assert said[1] == said[2] == f"decoded images: 5.8 KiB in '{entry_of(folder)}'"


def test_an_unreadable_image_is_tried_again(photos: Photos, folder: Path) -> None:
    kept = opened(photos, folder)
    check(kept, photos)
    photos.bad.clear()  # a network disk that is back
    check(kept, photos)


def test_workers_write_the_same(photos: Photos, tmp_path: Path) -> None:
    for workers, name in ((0, "one"), (2, "two")):
        opened(photos, tmp_path / name, workers=workers)
    one, two = (entry_of(tmp_path / name) for name in ("one", "two"))
    for file in ("pixels.bin", "index.bin", "manifest.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_a_loading_process_gets_its_own_handle(photos: Photos, folder: Path) -> None:
    kept = pickle.loads(pickle.dumps(opened(photos, folder)))
    check(kept, photos)


def test_larger_images_are_made_smaller(photos: Photos, folder: Path) -> None:
    kept, small = opened(photos, folder), opened(photos, folder, short_side=4)
    assert small.read(0).shape == (3, 4, 4)
    assert small.read(0).float().mean() == pytest.approx(photos.read(0).float().mean(), abs=12)
    check(kept, photos)
    check(opened(photos, folder, short_side=8), photos)  # none is larger


# --- damage


def _flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 16
    file.write_bytes(bytes(data))


def _replace(file: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    make(file)


def _huge(entry: Path) -> None:
    """An index of the right length and checksum, whose images are larger than the file."""
    index = np.frombuffer((entry / "index.bin").read_bytes(), disk_cache._ROW).copy()
    index["height"], index["width"] = 2**31 - 1, 2**31 - 1
    _index(entry, index)


def _negative(entry: Path) -> None:
    index = np.frombuffer((entry / "index.bin").read_bytes(), disk_cache._ROW).copy()
    index["height"][0], index["height"][1] = -9, 8 + 18
    _index(entry, index)


def _index(entry: Path, index: np.ndarray) -> None:
    (entry / "index.bin").write_bytes(index.tobytes())
    manifest = json.loads((entry / "manifest.json").read_text())
    manifest["index"] = disk_cache.hashlib.sha256(index.tobytes()).hexdigest()
    (entry / "manifest.json").write_text(json.dumps(manifest))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "index flipped": lambda e: _flip(e / "index.bin", 5),
    "index cut": lambda e: os.truncate(e / "index.bin", 24),
    "index of other sizes": _huge,
    "index of negative sizes": _negative,
    "index gone": lambda e: (e / "index.bin").unlink(),
    "index a pipe": lambda e: _replace(e / "index.bin", os.mkfifo),
    "pixels cut": lambda e: os.truncate(e / "pixels.bin", 100),
    "pixels gone": lambda e: (e / "pixels.bin").unlink(),
    "pixels a folder": lambda e: _replace(e / "pixels.bin", Path.mkdir),
    "manifest empty": lambda e: (e / "manifest.json").write_bytes(b""),
    "manifest a list": lambda e: (e / "manifest.json").write_text("[1]"),
    "manifest nested": lambda e: (e / "manifest.json").write_text("[" * 100_000),
    "manifest endless": lambda e: os.truncate(e / "manifest.json", 1 << 40),
    "manifest a pipe": lambda e: _replace(e / "manifest.json", os.mkfifo),
    "another version": lambda e: (e / "manifest.json").write_text('{"version": 0}'),
    "a file": lambda e: _replace(e, Path.touch),
    "a link": lambda e: _replace(e, lambda p: p.symlink_to("/dev")),
    "an empty folder": lambda e: _replace(e, Path.mkdir),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_written_anew(damage: str, photos: Photos, folder: Path) -> None:
    entry = written(photos, folder)
    before = (entry / "pixels.bin").read_bytes()
    DAMAGE[damage](entry)
    said: list[str] = []
    check(opened(photos, folder, said), photos)
    assert "is written anew: " in said[0] or damage == "an empty folder", said
    assert (entry / "pixels.bin").read_bytes() == before
    assert [p.suffix for p in sorted(folder.iterdir())] == ["", ".lock"], "nothing is left over"
    assert Path("/dev").is_dir()


def test_a_damaged_image_comes_from_its_source(photos: Photos, folder: Path) -> None:
    entry = written(photos, folder)
    kept = opened(photos, folder)
    _flip(entry / "pixels.bin", 3 * 9 * 8 + 1)
    check(kept, photos)
    photos.reads()
    kept.read(0)
    assert photos.reads() == []
    kept.read(1)
    assert photos.reads() == [1]
    said: list[str] = []
    check(opened(photos, folder, said), photos)
    assert "written anew: an image in it was damaged" in said[0]
    photos.reads()
    opened(photos, folder).read(1)
    assert photos.reads() == []


def test_a_file_that_is_cut_while_it_is_read(photos: Photos, folder: Path) -> None:
    """A memory map would end the process here."""
    entry = written(photos, folder)
    kept = opened(photos, folder)
    os.truncate(entry / "pixels.bin", 50)
    check(kept, photos)


def test_an_entry_that_vanishes_while_it_is_read(photos: Photos, folder: Path) -> None:
    written(photos, folder)
    kept = opened(photos, folder)
    later = pickle.loads(pickle.dumps(kept))
    shutil.rmtree(folder)
    check(later, photos)
    check(kept, photos)


# --- staleness


def test_other_images_take_the_old_one_s_place(photos: Photos, folder: Path) -> None:
    entry = written(photos, folder)
    other = Photos("made", 255 - photos.images, photos.labels, photos.classes, log=photos.log)
    said: list[str] = []
    check(opened(other, folder, said, identity={"names": "y"}), other)
    assert "is written anew: the images or how they are read changed" in said[0]
    assert entry_of(folder) == entry


def test_another_decoder_decodes_anew(
    photos: Photos, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(photos, folder)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.1")
    opened(photos, folder)
    assert len(photos.reads()) >= N


def test_stamps_tell_what_a_sample_does_not(
    tmp_path: Path, images: Callable[..., Path], encode: Callable[..., bytes]
) -> None:
    root = images(tmp_path / "photos", "a.png", "b.png", "c.png")
    files = FileSource("photos", root, ("a.png", "b.png", "c.png"))
    part = Subset(files, np.array([0, 2]))
    before, part_before = stamp(files), stamp(part)
    assert (stamp(files), stamp(part)) == (before, part_before)
    os.utime(root / "b.png", ns=(1, 1))
    assert stamp(files) != before
    assert stamp(part) == part_before
    cells = [encode(np.full((4, 4, 3), n, np.uint8)) for n in (1, 2, 3)]
    tables = [
        ArrowSource("t", pyarrow.chunked_array([pyarrow.array(c)]))
        for c in (cells, cells, [cells[0], cells[2], cells[1]])
    ]
    assert stamp(tables[0]) == stamp(tables[1]) != stamp(tables[2])
    arrays = [ArraySource("a", torch.full((2, 3, 4, 4), n, dtype=torch.uint8)) for n in (1, 1, 2)]
    assert stamp(arrays[0]) == stamp(arrays[1]) != stamp(arrays[2])


def test_entries_are_named_by_where_the_images_are(
    photos: Photos, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts, sizes and folders of one name have entries of their own; other classes do not."""
    (tmp_path / "x/photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    name = disk_cache._name
    here = FileSource("photos", Path("x/photos"), ())
    there = FileSource("x/photos", tmp_path / "x/photos", ())
    assert name(here, None) == name(there, None)
    sources = [photos, Subset(photos, np.arange(3)), Subset(photos, np.arange(4)), here]
    nested = Subset(Subset(photos, np.arange(9)), np.arange(3))
    assert len({name(s, None) for s in (*sources, nested)} | {name(photos, 8)}) == 6
    assert name(Relabelled(photos, np.zeros(N, np.int64), ("a",)), None) == name(photos, None)


# --- writing


def test_what_a_killed_process_wrote_is_gone_on_with(
    photos: Photos, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featdistill.data.kept._BLOCK", 1000)  # blocks of 4 images

    def killed(done: int, total: int) -> None:
        if done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    child = FORK.Process(target=opened, args=(photos, folder), kwargs={"progress": killed})
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    photos.reads()
    with open(entry_of(folder) / "pixels.bin", "ab") as pixels:
        pixels.write(b"half a block")
    said: list[str] = []
    kept = opened(photos, folder, said)
    again = photos.reads()[N:]  # after the sample
    assert 0 < len(again) <= N // 2
    assert min(again) >= N // 2
    assert f"decoding {len(again)} of 30 images" in said[0]
    check(kept, photos)


@pytest.mark.parametrize("left", ["other images", "a file", "a broken index", "too few pixels"])
def test_what_cannot_be_gone_on_with_is_begun_again(
    left: str, photos: Photos, folder: Path
) -> None:
    entry = written(photos, folder)
    part = entry.with_suffix(".part")
    if left == "a file":
        part.touch()
    else:
        shutil.copytree(entry, part)
        head = json.loads((part / "manifest.json").read_text())
        del head["index"]
        head["identity"] = {"names": "y"} if left == "other images" else head["identity"]
        (part / "begun.json").write_text(json.dumps(head))
        if left == "a broken index":
            _flip(part / "index.bin", 3)
        if left == "too few pixels":
            os.truncate(part / "pixels.bin", 70)
    shutil.rmtree(entry)
    check(opened(photos, folder), photos)
    assert [p.suffix for p in sorted(folder.iterdir())] == ["", ".lock"]


def test_two_processes_decode_each_image_once(photos: Photos, folder: Path) -> None:
    barrier = FORK.Barrier(2)

    def both() -> None:
        barrier.wait(60)
        check(opened(photos, folder), Photos("made", photos.images, bad=photos.bad))

    children = [FORK.Process(target=both) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    bad = 2 * len(photos.bad)  # which each tries again
    assert len(photos.reads()) == N + N + bad, "a sample, and every image, of one of them"


def test_without_locks_each_writes_for_itself(
    photos: Photos, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unknown)
    check(opened(photos, folder), photos)
    check(opened(photos, folder, identity={"names": "y"}), photos)
    assert [p.suffix for p in sorted(folder.iterdir())] == ["", ".lock"]


def test_too_little_room(photos: Photos, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = 3 * 8 * (9 + 8) // 2 * N
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=need))
    with pytest.raises(DataError) as caught:
        opened(photos, folder)
    said = str(caught.value)
    assert "the decoded images of 'made' take about 6.0 KiB in" in said
    assert "--data.cache_folder" in said
    assert [p.suffix for p in folder.iterdir()] == [".lock"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * need))
    check(opened(photos, folder), photos)


def test_a_disk_that_fills_up(photos: Photos, folder: Path) -> None:
    def full(done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"cannot write the cache in .*No space left.*make room"):
        opened(photos, folder, progress=full)
    assert [p.suffix for p in folder.iterdir()] == [".lock"], "its room is given back"
    check(opened(photos, folder), photos)


def test_a_folder_that_cannot_be_made(photos: Photos, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write the cache in .*--data.cache_folder"):
        opened(photos, tmp_path / "file" / "cache")


def test_a_disk_that_keeps_other_bytes(
    photos: Photos, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = disk_cache._put

    def put(part: Path, entry: Path) -> None:
        os.truncate(part / "pixels.bin", 7)
        real(part, entry)

    monkeypatch.setattr(disk_cache, "_put", put)
    with pytest.raises(DataError, match="cannot be read back as it was written"):
        opened(photos, folder)


def test_no_image_of_a_sample_can_be_read(photos: Photos, folder: Path) -> None:
    photos.bad.update(range(N))
    with pytest.raises(DataError, match=r"none of 30 images of 'made' could be read, the last"):
        opened(photos, folder)
