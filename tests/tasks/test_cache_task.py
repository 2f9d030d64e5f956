"""A cache of decoded images changes how long a run takes, and no bit of what it learns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import featdistill
from featdistill.core.errors import ConfigError, RunError
from featdistill.data.decode import decode
from tests.data.test_batched_views import EXACT
from tests.tasks.conftest import SHAPE, TINY
from tests.tasks.test_distill_task import differing

exact = pytest.mark.skipif(not EXACT, reason="torchvision resizes floats on this processor")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 20 images to learn and 6 to score on; one of them is no image."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 6)):
        for number in range(2 * count):
            file = root / part / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (12, 12 + number % 2, 3), np.uint8)
            Image.fromarray(pixels).save(file)
    (root / "train/a/6.png").write_bytes(b"no image")
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/featdistill/decoded"


def distill(teacher: Path, photos: Path, out: Path, **data: Any) -> None:
    options: dict[str, Any] = {**TINY, "steps": 8, "batch_size": 10, "holdout": "9"}
    options["data"] = {"path": str(photos), "bad_image_limit": 0.5, **data}
    featdistill.distill(
        teacher=teacher,
        student={"name": "vit-t", **SHAPE, "drop_path": 0.3},
        out=out,
        run={"log_every": 1, "checkpoint_every": 3, "tensorboard": False},
        schedule={"stop_at": 5} if out.name == "half" else {},
        resume=out.name == "again",
        **options,
    )


def quarantined(out: Path) -> str:
    return (out / "quarantine.jsonl").read_text()


@exact
@pytest.mark.parametrize("kind", ["device", "disk"])
def test_the_weights_are_those_of_no_cache(
    kind: str, teacher: Path, photos: Path, tmp_path: Path, cache: Path
) -> None:
    distill(teacher, photos, tmp_path / "plain")
    distill(teacher, photos, tmp_path / kind, cache=kind)
    assert differing(tmp_path / "plain", tmp_path / kind) == []
    assert "6.png" in quarantined(tmp_path / kind)
    assert quarantined(tmp_path / kind) == quarantined(tmp_path / "plain")
    assert cache.exists() == (kind == "disk")


@exact
@pytest.mark.parametrize("kind", ["device", "disk"])
def test_several_students_of_one_cache(
    kind: str, teacher: Path, photos: Path, tmp_path: Path, cache: Path
) -> None:
    for name in ("none", kind):
        options: dict[str, Any] = {**TINY, "steps": 3, "batch_size": 10}
        options["data"] = {"path": str(photos), "bad_image_limit": 0.5, "cache": name}
        shape = {"name": ["vit-t", "vit-t"], **SHAPE}
        featdistill.distill(teacher=teacher, student=shape, out=tmp_path / name, **options)
    for student in ("vit-t", "vit-t-2"):
        assert differing(tmp_path / "none" / student, tmp_path / kind / student) == []
    assert cache.exists() == (kind == "disk")


@exact
@pytest.mark.parametrize(("first", "second"), [("device", "none"), ("none", "device")])
def test_a_run_goes_on_with_another_cache(
    first: str, second: str, teacher: Path, photos: Path, tmp_path: Path
) -> None:
    distill(teacher, photos, tmp_path / "whole", cache="none")
    distill(teacher, photos, tmp_path / "half", cache=first)
    shutil.move(tmp_path / "half", tmp_path / "again")
    distill(teacher, photos, tmp_path / "again", cache=second)
    assert differing(tmp_path / "whole", tmp_path / "again") == []


def test_a_run_goes_on_from_disk(
    teacher: Path, photos: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(teacher, photos, tmp_path / "whole")
    distill(teacher, photos, tmp_path / "half", cache="disk")
    shutil.move(tmp_path / "half", tmp_path / "again")
    distill(teacher, photos, tmp_path / "again", cache="disk", cache_folder=str(cache))
    assert differing(tmp_path / "whole", tmp_path / "again") == []
    assert capsys.readouterr().err.count("decoding 40 of 40 images into") == 1


def test_smaller_images_are_another_run(
    teacher: Path, photos: Path, tmp_path: Path, cache: Path
) -> None:
    distill(teacher, photos, tmp_path / "half", cache="disk", cache_short_side=10)
    shutil.move(tmp_path / "half", tmp_path / "again")
    with pytest.raises(RunError, match=r"data\.cache_short_side: 10 -> None"):
        distill(teacher, photos, tmp_path / "again")
    distill(teacher, photos, tmp_path / "again", cache="device", cache_short_side=10)


def test_an_image_that_changes_is_decoded_anew(
    teacher: Path, photos: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "photos"
    shutil.copytree(photos, copied)
    distill(teacher, copied, tmp_path / "one", cache="disk")
    Image.new("RGB", (12, 12)).save(copied / "train/a/8.png")
    distill(teacher, copied, tmp_path / "two", cache="disk")
    assert "is written anew: the images or how they are read changed" in capsys.readouterr().err
    distill(teacher, copied, tmp_path / "plain")
    assert differing(tmp_path / "two", tmp_path / "plain") == []
    assert differing(tmp_path / "two", tmp_path / "one")


def finetune(model: Path, photos: Path, out: Path, **data: Any) -> Any:
    options = {**TINY, "steps": 6, "batch_size": 10}
    options["data"] = {"path": str(photos), "bad_image_limit": 0.5, **data}
    view = {"randaugment": None} if data.get("cache") != "disk" else {}
    return featdistill.finetune(model=model, out=out, view=view, **options)


@exact
def test_finetuning_from_the_device(student: Path, photos: Path, tmp_path: Path) -> None:
    """Bicubic crops; a label budget; scores of the held-out images."""
    runs = [
        finetune(student, photos, tmp_path / kind, cache=kind, labels="15")
        for kind in ("none", "device")
    ]
    assert differing(tmp_path / "none", tmp_path / "device") == []
    assert runs[0].top1 == runs[1].top1


def test_scored_images_are_kept_on_disk_too(
    student: Path, photos: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(student, photos, tmp_path / "one", cache="disk")
    assert len(list(cache.glob("*/manifest.json"))) == 2
    decoded: list[int] = []

    def count(data: bytes) -> torch.Tensor:
        decoded.append(1)
        return decode(data)

    monkeypatch.setattr("featdistill.data.sources.decode", count)
    finetune(student, photos, tmp_path / "two", cache="disk")
    # the fingerprints', and the file that is no image whenever it is wanted
    assert len(decoded) < 2 * (40 + 12) + 40
    assert differing(tmp_path / "one", tmp_path / "two") == []


def test_pretraining_from_disk(photos: Path, tmp_path: Path, cache: Path) -> None:
    for kind in ("none", "disk"):
        options = {**TINY, "steps": 3, "batch_size": 10}
        options["data"] = {"path": str(photos), "bad_image_limit": 0.5, "cache": kind}
        shape = {"name": "vit-t", **SHAPE}
        featdistill.pretrain(model=shape, out=tmp_path / kind, **options)
    assert differing(tmp_path / "none", tmp_path / "disk") == []


def test_a_probe_and_a_comparison_from_disk(
    teacher: Path, student: Path, photos: Path, tmp_path: Path, cache: Path
) -> None:
    whole = tmp_path / "photos"
    shutil.copytree(photos, whole)
    (whole / "train/a/6.png").unlink()
    options: dict[str, Any] = {"workers": 0, "device": "cpu", "image_size": 8, "batch_size": 10}
    found = []
    for kind in ("none", "disk"):
        data = {"path": str(whole), "cache": kind}
        featdistill.probe(
            models=[str(student)], out=tmp_path / f"probe-{kind}", data=data, seeds=[1], **options
        )
        arrays = np.load(next((tmp_path / f"probe-{kind}").glob("**/*fit*.npz")))
        compared = featdistill.compare(
            teacher=teacher,
            student=student,
            out=tmp_path / f"compare-{kind}",
            data=data,
            seeds=[1],
            lrs=[1.0],
            scratch=False,
            steps=2,
            **options,
        )
        scores = [row["top1"] for row in compared.results["rows"]]
        found.append((scores, arrays["weight"].tolist()))
    assert found[0] == found[1]
    assert len(list(cache.glob("*/manifest.json"))) == 2


def test_a_check_says_what_a_cache_takes_and_writes_none(
    teacher: Path, photos: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"device": "cache about 18.3 KiB on the device", "disk": "cache about 17.6 KiB in"}
    for kind, says in wanted.items():
        data = {"path": str(photos), "cache": kind}
        options = {**TINY, "steps": 2, "batch_size": 10, "data": data}
        shape = {"name": "vit-t", **SHAPE}
        featdistill.check(teacher=teacher, student=shape, **options)
        said = " ".join(capsys.readouterr().out.split())
        assert says in said, said
    assert not cache.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cache": "ram"}, "'none', 'device' or 'disk'"),
        ({"cache_short_side": 8}, "cache_short_side is of --data.cache device or disk"),
        ({"cache_folder": "x"}, "cache_folder is of --data.cache disk"),
        ({"cache": "device", "cache_folder": "x"}, "cache_folder is of --data.cache disk"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        featdistill.distill(teacher="x", data={"path": "digits", **options}, out=tmp_path / "run")
