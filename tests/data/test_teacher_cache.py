"""The teacher cache's files: what comes out is what went in, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featdistill.core.errors import RunError
from featdistill.core.types import Replaced
from featdistill.data import teacher_cache
from featdistill.data.decode import BadImage
from featdistill.data.loader import training_batches
from featdistill.data.sources import ArraySource
from featdistill.data.teacher_cache import TeacherCache
from featdistill.data.views import CropView

IMAGES, SHAPE = 11, (3, 4)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD", 4)


def cache(folder: Path, *, views: int = 2, **identity: Any) -> TeacherCache:
    known = {"teacher": "abc", "rgb": (0.5, 0.25), **identity}
    return TeacherCache(folder, known, images=IMAGES, shape=SHAPE, views=views, seed=7)


def entry(view: int, index: int) -> Tensor:
    rng = torch.Generator().manual_seed(1000 * view + index)
    return torch.randn(SHAPE, generator=rng).bfloat16()


def filled(folder: Path, *, unreadable: int | None = None, **options: Any) -> TeacherCache:
    made = cache(folder, **options)
    made.begin()
    for shard in made.missing(made.views):
        entries = torch.stack([entry(shard.view, i) for i in shard.images])
        made.write(shard, entries, [i != unreadable for i in shard.images])
    return made


def same(made: TeacherCache, view: int, index: int) -> bool:
    found = made.read(view, index)
    return found is not None and torch.equal(found, entry(view, index))


def test_what_comes_out_is_what_went_in(tmp_path: Path) -> None:
    made = filled(tmp_path / "cache")
    assert all(same(made, v, i) for v in range(2) for i in range(IMAGES))
    again = cache(tmp_path / "cache")
    assert again.missing(2) == []
    assert same(again, 1, IMAGES - 1)


def test_the_size_is_known_before(tmp_path: Path) -> None:
    made = filled(tmp_path / "cache")
    size = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.safetensors"))
    told = 2 * made.bytes_for(IMAGES)
    assert size <= told
    fixed = 2 * 3 * teacher_cache._HEADER  # of six shards
    assert told - size < fixed


def test_nothing_is_written_before_the_pass_begins(tmp_path: Path) -> None:
    made = cache(tmp_path / "cache")
    made.check()
    assert len(made.missing(2)) == 6
    assert made.read(0, 0) is None
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Whatever byte of a shard is flipped, no entry comes out otherwise than it went in."""
    made = filled(tmp_path / "cache")
    file = made.file(made.shard_of(0, 0))
    whole, hit = file.read_bytes(), set()
    for at in range(len(whole)):
        bad = bytearray(whole)
        bad[at] ^= 1 << at % 8
        file.write_bytes(bad)
        for index in range(4):
            found = made.read(0, index)
            if found is None:
                hit.add(index)
            else:
                assert torch.equal(found, entry(0, index)), (at, index)
    assert hit == set(range(4))


def test_a_shard_cut_anywhere_is_missing(tmp_path: Path) -> None:
    made = filled(tmp_path / "cache")
    shard = made.shard_of(1, 4)
    file = made.file(shard)
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert made.missing(2) == [shard]
        assert made.read(1, 5) is None or same(made, 1, 5)  # what was before the cut is whole
    assert same(made, 1, 5)
    file.write_bytes(whole[: len(whole) // 3])
    assert made.read(1, 5) is None
    file.unlink()
    assert made.missing(2) == [shard]
    assert made.read(1, 5) is None


def test_an_entry_is_of_its_own_address_alone(tmp_path: Path) -> None:
    """Another view's shard, or another images', under this one's name."""
    made = filled(tmp_path / "cache")
    mine = made.file(made.shard_of(0, 0))
    for other in (made.shard_of(1, 0), made.shard_of(0, 4)):
        shutil.copy(made.file(other), mine)
        assert made.read(0, 0) is None


def test_an_entry_is_of_its_own_teacher_alone(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    (tmp_path / "cache/manifest.json").unlink()  # which would tell
    other = cache(tmp_path / "cache", teacher="xyz")
    other.check()
    assert other.read(0, 0) is None
    assert len(other.missing(2)) == 6


def test_an_image_that_could_not_be_read_has_no_entry(tmp_path: Path) -> None:
    made = filled(tmp_path / "cache", unreadable=5)
    assert made.missing(2) == []
    with pytest.raises(BadImage, match="when the teacher cache was filled"):
        made.read(0, 5)
    assert same(made, 0, 4)


def test_more_views_are_added_and_fewer_are_a_part(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    assert cache(tmp_path / "cache", views=1).missing(1) == []
    more = cache(tmp_path / "cache", views=3)
    more.check()
    assert {s.view for s in more.missing(3)} == {2}


def test_what_a_kill_left_half_written_goes(tmp_path: Path) -> None:
    made = filled(tmp_path / "cache")
    folder = tmp_path / "cache/view-0000"
    host = teacher_cache._host()
    gone = folder / f".shard-00000000.{host}.99999999.tmp"
    elsewhere = folder / ".shard-00000000.another-host.99999999.tmp"
    at_work = folder / f".shard-00000001.{host}.1.tmp"
    for path in (gone, elsewhere, at_work):
        path.write_bytes(b"half")
    made.begin()
    assert not gone.exists()
    assert elsewhere.exists()
    assert at_work.exists()


def test_a_disk_that_refuses_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cache(tmp_path / "cache")
    made.begin()
    shard = made.shard_of(0, 0)

    def full(_tensors: object, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_cache, "save_file", full)
    with pytest.raises(RunError, match=r"No space left on device.*make room"):
        made.write(shard, torch.zeros(4, *SHAPE).bfloat16(), [True] * 4)
    assert list((tmp_path / "cache/view-0000").iterdir()) == []


# --- folders that are refused


def test_another_teachers_cache_is_refused_and_named(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    before = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=r"teacher: abc there, xyz here.*delete that folder"):
        cache(tmp_path / "cache", teacher="xyz").begin()
    with pytest.raises(RunError, match=r"rgb: \[0.5, 0.25\] there, \[0.5, 0.5\] here"):
        cache(tmp_path / "cache", rgb=(0.5, 0.5)).check()
    assert before == {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file()}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"identity": {}}'])
def test_a_damaged_manifest_is_named_and_can_be_deleted(tmp_path: Path, text: str) -> None:
    made = filled(tmp_path / "cache")
    manifest = tmp_path / "cache/manifest.json"
    manifest.write_text(text)
    with pytest.raises(RunError, match=r"manifest\.json' is damaged.*delete it"):
        made.check()
    manifest.unlink()
    made.begin()
    assert made.missing(2) == []
    assert json.loads(manifest.read_text())["identity"]["teacher"] == "abc"


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("x")
    with pytest.raises(RunError, match=r"no teacher cache \(it holds 'precious.txt'\)"):
        cache(tmp_path / "mine").check()
    with pytest.raises(RunError, match="is a file"):
        cache(tmp_path / "mine/precious.txt").check()
    made = filled(tmp_path / "cache")
    manifest = tmp_path / "cache/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(RunError, match="format 99"):
        made.check()


# --- with a run's batches

PIXELS = torch.randint(
    0, 256, (IMAGES, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)
VIEW = CropView(8)


class Torn(ArraySource):
    """Image 3 cannot be read."""

    def read(self, index: int) -> Tensor:
        if index == 3:
            raise BadImage("torn")
        return super().read(index)


def batches(made: TeacherCache, *, bad: bool = False, workers: int = 0) -> list[Any]:
    source = (Torn if bad else ArraySource)("noise", PIXELS)
    options: dict[str, Any] = {"batch_size": 5, "seed": 0, "start": 0, "stop": 8}
    return list(training_batches(source, VIEW, workers=workers, cache=made, **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_brings_what_was_said_of_its_very_views(tmp_path: Path, workers: int) -> None:
    for step, batch in enumerate(batches(filled(tmp_path / "cache"), workers=workers)):
        view = step // 2 % 2
        for row, index in enumerate(batch.indices.tolist()):
            assert torch.equal(batch.taught[row], entry(view, index))
            assert torch.equal(batch.images[row], VIEW(PIXELS[index], (7, view, index))[0])


def test_views_repeat_after_k_epochs_and_not_before(tmp_path: Path) -> None:
    made = filled(tmp_path / "cache")
    addresses = [made.address(epoch, 3) for epoch in range(5)]
    assert addresses == [(7, 0, 3), (7, 1, 3)] * 2 + [(7, 0, 3)]


def test_a_damaged_entry_leaves_its_batch_without(tmp_path: Path) -> None:
    made = filled(tmp_path / "cache")
    made.file(made.shard_of(0, 9)).unlink()
    for step, batch in enumerate(batches(made)):
        hit = step // 2 % 2 == 0 and any(i >= 8 for i in batch.indices.tolist())
        assert (batch.taught is None) == hit


def test_a_substitute_brings_its_own(tmp_path: Path) -> None:
    met = 0
    for step, batch in enumerate(batches(filled(tmp_path / "cache"), bad=True)):
        for replaced in batch.replaced:
            assert isinstance(replaced, Replaced)
            row = batch.indices.tolist().index(3)
            if replaced.index == 3 and replaced.substitute not in (None, 3):
                met += 1
                want = entry(step // 2 % 2, replaced.substitute)
                assert torch.equal(batch.taught[row], want)
    assert met
