"""`--extend` wherever something is trained: a finished run goes on, and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import featdistill
from featdistill.core.errors import RunError
from tests.data.segmentation_folders import ade20k
from tests.tasks.conftest import SHAPE, TINY
from tests.tasks.test_segment_task import SMALL

Start = Callable[..., Any]


@pytest.fixture(params=["pretrain", "finetune", "segment"])
def start(request: pytest.FixtureRequest, student: Path, tmp_path: Path) -> Start:
    """A command, waiting for its length; it writes to `tmp_path / "run"`."""
    common: dict[str, Any] = {"out": tmp_path / "run", "run": {"tensorboard": False}}
    if request.param == "pretrain":
        options = {**TINY, "model": {"name": "vit-t", **SHAPE}}
        command = featdistill.pretrain
    elif request.param == "finetune":
        options = {**TINY, "model": student, "view": {"randaugment": None}}
        command = featdistill.finetune
    else:
        options = {**SMALL, "model": student, "data": ade20k(tmp_path / "scenes")}
        command = featdistill.segment
    return lambda **more: command(**{**options, **common, **more})


def test_a_finished_run_goes_on(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(steps=2).steps == 2
    with pytest.raises(RunError, match=r"schedule\.steps: 2 -> 5.*with --extend"):
        start(steps=5, resume=True)
    with pytest.raises(RunError, match=r"1 steps, and the run has done 2"):
        start(steps=2, resume=True, extend="steps=1")
    assert start(steps=2, resume=True, extend="steps=4").steps == 4
    record = json.loads(_record(run).read_text())
    plans = [(plan["since"], plan["steps"]) for plan in record["results"]["schedules"]]
    assert plans == [(0, 2), (2, 4)]
    assert yaml.safe_load((run / "config.yaml").read_text())["schedule"]["steps"] == 4


def _record(run: Path) -> Path:
    found = [run / f"{kind}.json" for kind in ("pretrain", "finetune", "segment")]
    return next(file for file in found if file.is_file())
