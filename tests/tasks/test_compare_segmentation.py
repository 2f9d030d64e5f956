"""compare with segmentation data: every row's mIoU, by seed, in record and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import featdistill
from featdistill.core.errors import ConfigError, DataError, ModelError
from tests.data.segmentation_folders import ade20k
from tests.tasks.conftest import TINY


def compare(teacher: Path, student: Path, out: Path, **options: Any) -> Any:
    return featdistill.compare(
        teacher=teacher,
        student=student,
        out=out,
        **{**TINY, "steps": 1, "seeds": (1, 2), "lrs": (1.0,), "knn": None, **options},
    )


def test_every_row_has_its_miou(teacher: Path, student: Path, tmp_path: Path) -> None:
    scenes, out = ade20k(tmp_path / "scenes"), tmp_path / "compared"
    asked = {"data": str(scenes), "steps": 3, "image_size": 16, "batch_size": 4, "head": "linear"}
    compare(teacher, student, out, segment=asked)
    found = json.loads((out / "compare.json").read_text())["results"]
    assert found["segmentation"]["steps"] == 3
    assert found["segmentation"]["test_images"] == 4
    assert 0 < found["segmentation"]["prior_miou"] < 1
    assert [row["name"] for row in found["rows"]] == ["teacher", "student", "scratch"]
    for row in found["rows"]:
        runs = row["segmentation"]["runs"]
        assert [run["seed"] for run in runs] == [1, 2]
        mean = sum(run["miou"] for run in runs) / 2
        assert row["segmentation"]["miou"]["mean"] == pytest.approx(mean)
        for run in runs:
            assert (out / run["folder"] / "result.json").is_file()
            assert not (out / run["folder"] / "checkpoints").exists()
    page = (out / "report" / "index.html").read_text()
    for words in ("mIoU, linear, validation", "mIoU, seed 2", "mIoU by position alone"):
        assert words in page


def test_a_row_alone_is_what_segment_finds(teacher: Path, student: Path, tmp_path: Path) -> None:
    scenes = ade20k(tmp_path / "scenes")
    asked = {"data": str(scenes), "steps": 3, "image_size": 16, "batch_size": 4, "head": "linear"}
    compare(teacher, student, tmp_path / "c", segment=asked, seeds=(3,), scratch=False)
    rows = json.loads((tmp_path / "c" / "compare.json").read_text())["results"]["rows"]
    for row, model in zip(rows, (teacher, student), strict=True):
        alone = featdistill.segment(
            model=model,
            data=scenes,
            out=tmp_path / row["name"],
            head={"kind": "linear"},
            steps=3,
            image_size=16,
            batch_size=4,
            seed=3,
            workers=0,
            device="cpu",
        )
        assert row["segmentation"]["runs"][0]["miou"] == alone.miou


def test_what_cannot_be_is_said_before_the_first_fine_tuning(
    teacher: Path, student: Path, tmp_path: Path
) -> None:
    scenes, out = str(ade20k(tmp_path / "scenes")), tmp_path / "o"
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"steps": 3}, ConfigError, "--segment-data is required"),
        ({"data": scenes, "recipe": "ft-vit-b"}, ConfigError, "is for 'featdistill finetune'"),
        ({"data": scenes, "recipe": "seg-vit-x"}, ConfigError, "no recipe"),
        ({"data": "nowhere"}, DataError, "no segmentation data"),
        # two layers, and UperNet wants four
        ({"data": scenes, "batch_size": 4, "image_size": 16}, ModelError, "--head linear"),
    ]
    for asked, kind, message in cases:
        with pytest.raises(kind, match=message):
            compare(teacher, student, out, segment=asked)
    assert not out.exists()
