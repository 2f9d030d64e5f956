"""A resume checks what it goes on from: the images too, not their number alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featdistill.core.errors import DataError
from featdistill.data.open import open_data
from featdistill.data.sources import ArraySource, Relabelled, Subset
from featdistill.engine.fingerprint import check_data, fingerprint
from tests.faults.harness import Victim, consumed, finish, said


def write(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for n in range(6):
        write(root / "ab"[n % 2] / f"{n}.bmp", n)
    return root


def _same_size(root: Path) -> None:
    """Another picture under the same name, of as many bytes."""
    size = (root / "a/2.bmp").stat().st_size
    write(root / "a/2.bmp", 99)
    assert (root / "a/2.bmp").stat().st_size == size


def _other_format(root: Path) -> None:
    (root / "a/2.bmp").unlink()
    Image.new("RGB", (9, 9)).save(root / "a/2.bmp")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "added": (lambda root: write(root / "a/9.bmp", 9), "began with 6 images .* now there are 7"),
    "removed": (lambda root: (root / "a/2.bmp").unlink(), "now there are 5"),
    "renamed": (lambda root: (root / "a/2.bmp").rename(root / "a/7.bmp"), "renamed"),
    "another class": (lambda root: (root / "a/2.bmp").rename(root / "b/2.bmp"), "labels changed"),
    "replaced": (_other_format, "replaced by others of their name"),
    "replaced by as many bytes": (_same_size, "images look otherwise"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_files_are_seen(change: str, photos: Path) -> None:
    before = {"data": fingerprint(open_data(str(photos)).train)}
    check_data(before, fingerprint(open_data(str(photos)).train), open_data(str(photos)).train)
    do, message = CHANGES[change]
    do(photos)
    now = open_data(str(photos)).train
    with pytest.raises(DataError, match=message):
        check_data(before, fingerprint(now), now)


def test_another_place_of_the_same_files_is_the_same_data(photos: Path, tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere/photos"
    shutil.copytree(photos, copied)
    here, there = (fingerprint(open_data(str(root)).train) for root in (photos, copied))
    assert here == there


def test_which_part_and_which_labels_belong_to_it() -> None:
    images = torch.arange(5 * 3 * 4 * 4, dtype=torch.uint8).reshape(5, 3, 4, 4)
    whole = ArraySource("made", images, np.array([0, 1, 0, 1, 0]), ("a", "b"))
    parts = [Subset(whole, np.array(chosen)) for chosen in ([0, 1, 2], [0, 1, 3])]
    other = Relabelled(whole, np.array([1, 0, 1, 0, 1]), ("b", "a"))
    found = [fingerprint(s) for s in (whole, *parts, other)]
    assert len({tuple(sorted(f.items())) for f in found}) == 4


def test_a_checkpoint_of_an_earlier_version_knows_the_number_alone() -> None:
    source = ArraySource("made", torch.zeros(5, 3, 4, 4, dtype=torch.uint8))
    now = fingerprint(source)
    check_data({"data_images": 5}, now, source)
    with pytest.raises(DataError, match="began with 4 images"):
        check_data({"data_images": 4}, now, source)


def test_a_run_is_not_continued_on_other_images(tmp_path: Path) -> None:
    finish(tmp_path, resume=False, stop_at=6)
    before = consumed(tmp_path)
    assert Victim(tmp_path, resume=True, data_seed=1).end() == 2
    assert consumed(tmp_path) == before
    assert "images look otherwise" in said(tmp_path)
