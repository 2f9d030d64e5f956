"""Distilling from a teacher cache: the same training, the teacher asked once, whatever happens."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import featdistill
from featdistill.config.sections import CachedDataConfig
from featdistill.core.errors import ConfigError, DataError, RunError
from featdistill.data import teacher_cache as files
from featdistill.data.views import CropView
from featdistill.engine.rundir import read_metrics
from featdistill.objectives.distillation import FeatureDistillation
from featdistill.tasks.teacher_cache import _NO_PIXEL, shown
from tests.tasks.conftest import SHAPE, TINY
from tests.tasks.test_distill_task import differing, losses
from tests.tasks.test_preflight import assembled

# 50 images, 4 batches of 12 an epoch: the third epoch sees the views of the first
IMAGES = 50
SHORT: dict[str, Any] = {**TINY, "batch_size": 12, "steps": 12, "holdout": "none"}
QUIET: dict[str, Any] = {"preflight": False, "log_every": 1, "tensorboard": False}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARD", 8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, smooth enough that a crop of it looks otherwise than another."""
    folder = tmp_path_factory.mktemp("images")
    draw = torch.Generator().manual_seed(0)
    for i in range(IMAGES):
        pixels = torch.randint(0, 256, (5, 5, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((20, 20)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def at_hand(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHORT, "data", str(images))


def distill(teacher: Path, out: Path, cache: Path | None, **options: Any) -> Any:
    shape = {"name": "vit-t", **SHAPE, "drop_path": 0.3}
    kept = {} if cache is None else {"teacher_cache": {"folder": str(cache), "views": 2}}
    given = {**SHORT, **kept, **options}
    run = {**QUIET, **given.pop("run", {})}
    return featdistill.distill(teacher=teacher, student=shape, out=out, run=run, **given)


def shards(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*.safe*"))}


@pytest.fixture(scope="module")
def whole(teacher: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of three epochs with its cache of two views beside it."""
    desk = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SHARD", 8)
        distill(teacher, desk / "run", desk / "cache", data=str(images))
    return desk


def copied(whole: Path, folder: Path) -> Path:
    return Path(shutil.copytree(whole / "cache", folder / "cache"))


# --- the same training


def test_the_first_epochs_are_those_of_a_live_teacher(
    teacher: Path, whole: Path, tmp_path: Path
) -> None:
    """The cache's views are the live run's, until they repeat; bf16 is all that differs."""
    distill(teacher, tmp_path / "live", None)
    live, kept = losses(tmp_path / "live"), losses(whole / "run")
    assert len(live) == len(kept) == 12
    assert kept[:8] == pytest.approx(live[:8], rel=1e-3)
    assert kept[:8] != live[:8]
    # epoch 3 sees the views of epoch 1, whatever it would have seen
    assert kept[8:] != pytest.approx(live[8:], rel=1e-3)


@pytest.mark.parametrize("target", ["map", "gap", "pooled"])
@pytest.mark.parametrize("whitening", ["layernorm", "standardize"])
def test_every_target_and_whitening(
    teacher: Path, tmp_path: Path, target: str, whitening: str
) -> None:
    options: dict[str, Any] = {"steps": 3, "target": target, "whitening": whitening}
    distill(teacher, tmp_path / "live", None, **options)
    distill(teacher, tmp_path / "kept", tmp_path / "cache", **options)
    live, kept = losses(tmp_path / "live"), losses(tmp_path / "kept")
    assert kept == pytest.approx(live, rel=2e-3)


def test_an_entry_is_what_the_teacher_says_of_the_view(teacher: Path, whole: Path) -> None:
    _, assembly, cache = opened(teacher, whole)
    for index in (0, 7, 8, 49):
        entry = cache.read(1, index)
        wanted = said(assembly, view_of(assembly, index))
        torch.testing.assert_close(entry.float(), wanted, rtol=2**-8, atol=1e-5)


def test_a_mirrored_view_has_features_of_its_own(teacher: Path, whole: Path) -> None:
    """The mirror image of a teacher's features is not what it says of a mirror image."""
    _, assembly, cache = opened(teacher, whole)
    plain = CropView(assembly.view.size, flip=False)
    met = 0
    for index in range(30):
        view, unmirrored = view_of(assembly, index), view_of(assembly, index, plain)
        if torch.equal(view, unmirrored):
            continue
        met += 1
        assert torch.equal(view, unmirrored.flip(-1))
        entry = cache.read(1, index).float()
        tokens = said(assembly, unmirrored)
        cls, map_ = tokens[:1], tokens[1:].unflatten(0, (2, 2))
        mirrored = torch.cat([cls, map_.flip(1).flatten(0, 1)])
        right = (entry - said(assembly, view)).abs().max()
        wrong = (entry - mirrored).abs().max()
        assert wrong > 10 * right, index
    assert met > 5


def opened(teacher: Path, whole: Path) -> tuple[Any, Any, Any]:
    kept = {"folder": str(whole / "cache"), "views": 2}
    config, assembly = assembled(teacher, **SHORT, teacher_cache=kept)
    assert assembly.kept is not None
    return config, assembly, assembly.kept.cache


def view_of(assembly: Any, index: int, view: CropView | None = None) -> torch.Tensor:
    return (view or assembly.view)(assembly.data.train.read(index), (0, 1, index))[0]


@torch.no_grad()
def said(assembly: Any, view: torch.Tensor) -> torch.Tensor:
    """(N, D): what the teacher says, asked directly."""
    features = assembly.objective.teacher(view[None].float() / 255)
    return torch.cat([features.prefix[0], features.map[0].flatten(1).T])


# --- the teacher is asked once


def never(*_: object) -> None:
    raise AssertionError("the teacher was asked")


def test_a_second_run_asks_the_teacher_nothing_and_learns_the_same(
    teacher: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shards(whole / "cache")
    monkeypatch.setattr(FeatureDistillation, "teacher_features", never)
    distill(teacher, tmp_path / "run", whole / "cache", workers=2)
    assert differing(whole / "run", tmp_path / "run") == []
    # another student, another batch, another seed of everything but the views
    more: dict[str, Any] = {"batch_size": 10, "teacher_cache": {"folder": str(whole / "cache")}}
    more["teacher_cache"] |= {"views": 2, "seed": 0}
    distill(teacher, tmp_path / "other", None, seed=5, drop_path=0.0, **more)
    assert shards(whole / "cache") == before


def test_the_negative_control(teacher: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureDistillation, "teacher_features", never)
        with pytest.raises(AssertionError, match="asked"):
            distill(teacher, tmp_path / "live", None)


def test_the_cache_does_not_depend_on_the_run_that_fills_it(
    teacher: Path, whole: Path, tmp_path: Path
) -> None:
    """Not on batch, micro-batches, workers or student."""
    options: dict[str, Any] = {
        "batch_size": 6,
        "steps": 16,
        "workers": 2,
        "run": {"micro_batches": 2},
    }
    shape = {"name": "vit-t", **SHAPE, "width": 16}
    kept = {"folder": str(tmp_path / "cache"), "views": 2}
    run = {**QUIET, **options.pop("run")}
    given = {**SHORT, **options, "teacher_cache": kept}
    featdistill.distill(teacher=teacher, student=shape, out=tmp_path / "run", run=run, **given)
    assert shards(tmp_path / "cache") == shards(whole / "cache")


def test_a_short_run_fills_only_what_it_sees(teacher: Path, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "run", tmp_path / "cache", steps=2)
    assert {name.split("/")[0] for name in shards(tmp_path / "cache")} == {"view-0000"}


def test_scores_on_held_out_images_ask_a_resting_teacher(teacher: Path, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "run", tmp_path / "cache", steps=2, holdout="14", batch_size=9)
    rows = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "holdout_loss" in r]
    assert len(rows) == 3


def test_micro_batches_change_only_rounding(teacher: Path, whole: Path, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "run", whole / "cache", run={"micro_batches": 4})
    assert losses(tmp_path / "run") == pytest.approx(losses(whole / "run"), rel=1e-4)


# --- whatever happens


def killed_while_writing(teacher: Path, out: Path, cache: Path, number: int) -> None:
    """A run whose process ends in the middle of its n-th shard."""
    child = os.fork()
    if child == 0:
        real, count = files.save_file, 0

        def write(tensors: Any, file: Path, **options: Any) -> None:
            nonlocal count
            count += 1
            real(tensors, file, **options)
            if count == number:
                os.truncate(file, file.stat().st_size // 2)
                os._exit(9)

        files.save_file = write
        try:
            distill(teacher, out, cache)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("number", [1, 8, 14])
def test_a_run_killed_in_its_pass_goes_on(
    teacher: Path, whole: Path, tmp_path: Path, number: int
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    killed_while_writing(teacher, run, cache, number)
    done = {p: p.stat().st_mtime_ns for p in cache.rglob("shard-*")}
    assert len(done) == number - 1
    distill(teacher, run, cache, resume=True)
    assert differing(whole / "run", run) == []
    assert shards(cache) == shards(whole / "cache")
    assert not list(cache.rglob("*.tmp"))
    assert all(p.stat().st_mtime_ns == time for p, time in done.items())


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_before_and_while_it_trains(
    teacher: Path, whole: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard is gone, one is cut, one has a flipped byte when a stopped run goes on."""
    run, cache = tmp_path / "run", copied(whole, tmp_path)
    distill(teacher, run, cache, schedule={"stop_at": 3}, workers=workers)
    gone, cut, flipped = sorted((cache / "view-0001").iterdir())[3:6]
    gone.unlink()
    os.truncate(cut, 500)
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.write_bytes(data)
    distill(teacher, run, cache, resume=True, workers=workers)
    assert differing(whole / "run", run) == []
    assert shards(cache) == shards(whole / "cache")
    said = (run / "log.txt").read_text()
    assert f"'{flipped}' is damaged or gone; it is made again" in said
    assert "16 views written" in said


def test_images_that_cannot_be_read(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    (folder / "3.png").write_bytes(b"torn")
    options: dict[str, Any] = {"data": {"path": str(folder), "batch_size": 6, "workers": 0}}
    options |= {"teacher_cache": {"folder": str(tmp_path / "cache"), "views": 2}}
    options["data"]["bad_image_limit"] = 0.1
    for name in ("first", "second"):
        shape = {"name": "vit-t", **SHAPE}
        given = {k: v for k, v in TINY.items() if k not in options["data"] and k != "data"}
        run = {**QUIET, "out": str(tmp_path / name)}
        featdistill.distill(teacher=teacher, student=shape, steps=8, run=run, **given, **options)
        [line] = (tmp_path / name / "quarantine.jsonl").read_text().splitlines()
        assert json.loads(line)["reason"].startswith("3.png")
    assert differing(tmp_path / "first", tmp_path / "second") == []
    options["data"]["bad_image_limit"] = 0.05
    options["teacher_cache"]["folder"] = str(tmp_path / "another")
    run = {**QUIET, "out": str(tmp_path / "third")}
    with pytest.raises(DataError, match="1 of 12 images cannot be read"):
        featdistill.distill(teacher=teacher, student=shape, steps=8, run=run, **given, **options)


def test_an_image_that_stands_for_another() -> None:
    from featdistill.core.types import Batch, Replaced

    order = torch.tensor([4, 7, 2, 9])
    chains = (Replaced(7, "torn", 2), Replaced(2, "torn", 5), Replaced(2, "torn", 9))
    batch = Batch((torch.zeros(4, 3, 8, 8),), None, order, order, replaced=chains)
    assert shown(batch) == [4, 5, 9, 9]


# --- what is refused, and said


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"teacher_image_size": 12}, "image size"),
        ({"target": "gap"}, "target: map there, gap here"),
        ({"seed": 3}, "seed of the views: 0 there, 3 here"),
        ({"view": {"flip": False}}, "the view's flip: True there, False here"),
        ({"view": {"crop_scale": (0.5, 1.0)}}, "the view's scale"),
        ({"data": "digits", "batch_size": 240}, "the images' names"),
        ({"holdout": "9"}, "images: 50 there, 41 here"),
        ({"precision": "bf16"}, "precision: float32 there, bf16 here"),
    ],
    ids=str,
)
def test_a_cache_of_something_else_is_refused(
    teacher: Path, whole: Path, tmp_path: Path, options: dict[str, Any], names: str
) -> None:
    with pytest.raises(RunError, match="is of something else") as refused:
        distill(teacher, tmp_path / "run", whole / "cache", **options)
    assert names in str(refused.value)
    assert "give another --teacher-cache, or delete that folder" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_every_setting_of_the_data_is_known_to_change_pixels_or_not() -> None:
    """A new one is taken to change them until somebody says otherwise."""
    assert set(CachedDataConfig.model_fields) >= _NO_PIXEL


def test_decoded_images_on_disk_are_the_same_images(
    teacher: Path, images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureDistillation, "teacher_features", never)
    data = {"path": str(images), "cache": "disk", "cache_folder": str(tmp_path / "decoded")}
    distill(teacher, tmp_path / "run", copied(whole, tmp_path), data=data)
    assert differing(whole / "run", tmp_path / "run") == []


def test_another_teacher_is_refused(teacher: Path, student: Path, whole: Path) -> None:
    with pytest.raises(RunError, match=r"the teacher's weights: \w+ there, \w+ here"):
        distill(student, whole / "no", whole / "cache")


def test_check_says_the_size_and_writes_nothing(
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "SHARD", 256)
    where = tmp_path / "cache"
    options: dict[str, Any] = {"teacher_cache": {"folder": str(where), "views": 3}}
    given = {**SHORT, "data": "digits", "batch_size": 240, "steps": 500, **options}
    found = featdistill.check(teacher=teacher, student={"name": "vit-t", **SHAPE}, **given)
    said = " ".join(capsys.readouterr().out.split())
    # 3 views of 1198 images, 5 tokens of 32 channels in bf16
    assert f"1.1 MiB in '{where}': 3 fixed views of 1,198 images, 5 x 32 in bf16 each" in said
    assert "1.1 MiB of it to be written in a pass before the first step" in said
    assert "to fill the teacher cache" in said
    assert not where.exists()
    assert found.seconds > 0


def test_too_little_room_is_said_before(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(10**9, 0, 10**5))
    monkeypatch.setattr(files, "SHARD", 256)
    options: dict[str, Any] = {"data": "digits", "batch_size": 240}
    with pytest.raises(RunError, match=r"will write 0\.8 MiB .* 0\.1 MiB are free"):
        distill(teacher, tmp_path / "run", tmp_path / "cache", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_makes_no_sense_together(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a drop path of 0\.1 has many"):
        distill(teacher, tmp_path / "run", tmp_path / "cache", **{"teacher.drop_path": 0.1})
    with pytest.raises(ConfigError, match="of no use without a folder"):
        distill(teacher, tmp_path / "run", None, teacher_cache={"views": 2})


def test_a_resumed_run_keeps_its_views_wherever_they_are(
    teacher: Path, whole: Path, tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", copied(whole, tmp_path)
    distill(teacher, run, cache, schedule={"stop_at": 3})
    with pytest.raises(RunError, match=r"teacher_cache\.views: 2 -> None"):
        distill(teacher, run, None, resume=True)
    moved = cache.rename(tmp_path / "moved")
    distill(teacher, run, moved, resume=True)
    assert differing(whole / "run", run) == []
