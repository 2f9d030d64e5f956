"""`bench`: it runs, and says what it measured."""

from __future__ import annotations

import pytest

from featdistill.cli.main import main

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
