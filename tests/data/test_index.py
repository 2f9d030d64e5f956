"""The list of a folder's images, and its cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from featdistill.core.errors import DataError
from featdistill.data import index
from featdistill.data.index import index_folder

Write = Callable[..., Path]


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were scanned rather than taken from the cache."""
    done: list[Path] = []
    scan = index._scan

    def counted(root: Path) -> tuple[tuple[str, ...], dict[str, int]]:
        done.append(root)
        return scan(root)

    monkeypatch.setattr(index, "_scan", counted)
    return done


def later(folder: Path) -> None:
    """Move a folder's modification time on, as a change at a later time would."""
    now = os.stat(folder).st_mtime_ns + 10**9
    os.utime(folder, ns=(now, now))


def test_any_depth_sorted_and_relative(tmp_path: Path, images: Write) -> None:
    images(tmp_path, "b/2.png", "a/y/z/1.png", "b/10.png", "0.png")
    assert index_folder(tmp_path).files == ("0.png", "a/y/z/1.png", "b/10.png", "b/2.png")


def test_which_names_are_images(tmp_path: Path, images: Write) -> None:
    images(tmp_path, "A.JPEG", "b.JpG", "c.png", "d.tiff", "e.webp")
    images(tmp_path, "notes.txt", "jpg", "f.png.part", ".hidden.png", ".folder/g.png", "h/.i.png")
    assert index_folder(tmp_path).files == ("A.JPEG", "b.JpG", "c.png", "d.tiff", "e.webp")


def test_names_in_any_script(tmp_path: Path, images: Write) -> None:
    names = ("a b.png", "çà/日本.png", "new\nline.png")
    images(tmp_path, *names)
    assert set(index_folder(tmp_path).files) == set(names)
    assert set(index_folder(tmp_path).files) == set(names)


@pytest.mark.parametrize("target", [".", "a"])
def test_a_link_back_to_a_parent_ends(tmp_path: Path, images: Write, target: str) -> None:
    images(tmp_path, "a/b/1.png")
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path / target, target_is_directory=True)
    assert index_folder(tmp_path).files == ("a/b/1.png",)


def test_a_link_to_another_folder_is_followed(tmp_path: Path, images: Write) -> None:
    images(tmp_path / "root", "a/1.png")
    images(tmp_path / "elsewhere", "2.png")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "root" / "broken.png").symlink_to(tmp_path / "nowhere")
    assert "b/2.png" in index_folder(tmp_path / "root").files


def test_a_link_to_a_folder_beside_it_is_followed(tmp_path: Path, images: Write) -> None:
    """Only a way back up is left out; else which of two names is listed were left to chance."""
    images(tmp_path, "a/1.png")
    (tmp_path / "b").symlink_to(tmp_path / "a", target_is_directory=True)
    assert index_folder(tmp_path).files == ("a/1.png", "b/1.png")


def test_the_cache_is_used(tmp_path: Path, images: Write, scans: list[Path]) -> None:
    images(tmp_path, "a/1.png", "b/2.png")
    first = index_folder(tmp_path)
    assert index_folder(tmp_path) == first
    assert len(scans) == 1


def test_an_empty_folder_is_cached_too(tmp_path: Path, scans: list[Path]) -> None:
    assert index_folder(tmp_path).files == index_folder(tmp_path).files == ()
    assert len(scans) == 1


def test_each_folder_has_its_own_cache(tmp_path: Path, images: Write) -> None:
    images(tmp_path, "a/1.png", "b/2.png")
    assert index_folder(tmp_path / "a").files == ("1.png",)
    assert index_folder(tmp_path / "b").files == ("2.png",)


def test_a_new_file_is_seen(tmp_path: Path, images: Write, scans: list[Path]) -> None:
    images(tmp_path, "a/1.png")
    index_folder(tmp_path)
    images(tmp_path, "a/2.png")
    later(tmp_path / "a")
    assert index_folder(tmp_path).files == ("a/1.png", "a/2.png")
    assert len(scans) == 2


def test_a_removed_file_is_missed(tmp_path: Path, images: Write) -> None:
    images(tmp_path, "a/1.png", "a/2.png")
    index_folder(tmp_path)
    (tmp_path / "a" / "2.png").unlink()
    later(tmp_path / "a")
    assert index_folder(tmp_path).files == ("a/1.png",)


def test_a_new_and_a_removed_folder(tmp_path: Path, images: Write) -> None:
    images(tmp_path, "a/1.png")
    index_folder(tmp_path)
    images(tmp_path, "b/c/2.png")
    later(tmp_path)
    assert index_folder(tmp_path).files == ("a/1.png", "b/c/2.png")
    (tmp_path / "a" / "1.png").unlink()
    (tmp_path / "a").rmdir()
    later(tmp_path)
    assert index_folder(tmp_path).files == ("b/c/2.png",)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]\n", b"{}\n1.png", b'{"version": 1}', b"x" * 1000, "cut", "other"],
)
def test_a_damaged_cache_is_not_believed(
    tmp_path: Path, images: Write, content: bytes | str
) -> None:
    root = images(tmp_path / "root", "1.png", "2.png")
    cache = tmp_path / "cache"
    expected = index_folder(root, cache=cache)
    (file,) = cache.iterdir()
    text = file.read_text()
    if content == "cut":
        content = text.rpartition("\n")[0].encode()
    elif content == "other":
        content = text.replace(str(root), str(tmp_path)).encode()
    assert isinstance(content, bytes)
    file.write_bytes(content)
    assert index_folder(root, cache=cache) == expected
    assert file.read_text() == text


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, images: Write) -> None:
    root = images(tmp_path / "root", "1.png")
    (tmp_path / "file").touch()
    assert index_folder(root, cache=tmp_path / "file" / "cache").files == ("1.png",)


def test_a_folder_that_cannot_be_read(
    tmp_path: Path, images: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def refuse(path: Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read the folder '.*/b' \(Permission denied\)"):
        index_folder(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        index_folder(tmp_path / "nowhere")
