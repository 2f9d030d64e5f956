"""`bench`: it runs, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featdistill.cli.main import main
from featdistill.tasks.bench.photographs import photograph

SMALL = ("--model", "timm/vit_tiny_patch16_224", "--image-size", "64", "--device", "cpu")


def test_it_says_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "diagnose", *SMALL, "--batch-size", "2", "--rounds", "1"]) == 0
    said = capsys.readouterr().err
    for line in ("plain forward pass   1.00  ", "all of attention", "all maps kept first", "MiB"):
        assert line in said


def test_a_cnn_has_nothing_to_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "diagnose", *SMALL, "--model", "timm/resnet18"]) == 2
    assert "no attention was seen" in capsys.readouterr().err


def test_a_landscapes_points_beside_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "landscape", *SMALL, "--batch-size", "2", "--rounds", "2"]) == 0
    said = capsys.readouterr().err
    for line in ("plain evaluation      1.00", "directions", "441 evaluations, 457 points"):
        assert line in said


def test_loading_beside_the_official_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featdistill.tasks.bench.data._STEPS", 4)
    few = ("--images", "2", "--rounds", "2", "--image-size", "160")
    assert main(["bench", "data", *few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"]["height"] == 400
    assert found["images"]["width"] == 500
    assert 90_000 < found["images"]["bytes"] < 130_000, "as ImageNet's"
    for part in (found["core"], found["loader"]):
        for way in ("official", "exact", "fast"):
            assert part[way]["images_per_second"] > 0
            assert part[way]["ratio"]["min"] <= part[way]["ratio"]["max"]
    assert found["core"]["official"]["ratio"] == {"median": 1, "min": 1, "max": 1}
    assert found["ratio"] == found["core"]["exact"]["ratio"]["median"]
    assert found["cores_for"]["exact"] >= 2500 / found["images_per_second"]
    assert found["difference"] == {"mean": 0, "max": 0, "views": 0}, "no crop is twice as large"
    assert found["set_up"]["rounds"] == 2


def test_loading_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Large pictures, of which fast decodes less."""
    (tmp_path / "a.jpg").write_bytes(photograph(0, height=300, width=300))
    (tmp_path / "b.jpg").write_bytes(photograph(1, height=300, width=300))
    few = ("--images", "2", "--rounds", "1", "--image-size", "16", "--data", str(tmp_path))
    assert main(["bench", "data", *few]) == 0
    said = capsys.readouterr().err
    for line in ("2 images, 300x300 and ", "official (Pillow, float)", "fast differs from exact"):
        assert line in said
    assert "in 0% of the views" not in said


def test_what_bench_data_cannot_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "data", "--data", "digits"]) == 2
    assert "'digits' is no folder of image files" in capsys.readouterr().err
    (tmp_path / "a.jpg").write_bytes(photograph(0, height=30, width=30)[:300])
    assert main(["bench", "data", "--data", str(tmp_path)]) == 2
    assert "cannot read 'a.jpg'" in capsys.readouterr().err
