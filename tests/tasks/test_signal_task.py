"""The signal while distilling: it is there, it is right, and training does not notice it."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import featdistill
from featdistill.cli.main import main
from featdistill.core.errors import ConfigError, Interrupted, RunError
from featdistill.engine.best import read_best
from featdistill.engine.checkpoint import Checkpoint, Checkpoints
from featdistill.engine.rundir import read_metrics
from featdistill.evaluation import fidelity as module
from tests.tasks.conftest import SHAPE, TINY

HELD = {"holdout_loss", "holdout_cosine", "holdout_explained_variance"}
RANKS = {"student_rank", "teacher_rank", "rank_alarm"}


def distill(teacher: Path, out: Path, **options: Any) -> Any:
    base: dict[str, Any] = {**TINY, "steps": 6, "run": {"eval_every": 2, "tensorboard": False}}
    base["run"] = {**base["run"], **options.pop("run", {})}
    shape = {"name": "vit-t", **SHAPE, "drop_path": 0.3}
    return featdistill.distill(teacher=teacher, student=shape, out=out, **{**base, **options})


def state(out: Path) -> dict[str, torch.Tensor]:
    found = Checkpoints(out / "checkpoints").latest()
    assert found is not None
    return {f"{f}/{k}": v for f, tensors in found.files.items() for k, v in tensors.items()}


def same(one: Path, other: Path) -> bool:
    a, b = state(one), state(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def scores(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if "holdout_loss" in row]


def test_scores_before_the_first_step_now_and_then_and_at_the_end(
    teacher: Path, tmp_path: Path
) -> None:
    distill(teacher, tmp_path / "run", run={"tensorboard": True})
    rows = scores(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert all(set(row) == {"step"} | HELD | RANKS for row in rows)
    assert rows[-1]["holdout_loss"] < rows[0]["holdout_loss"]
    assert len({row["teacher_rank"] for row in rows}) == 1
    record = json.loads((tmp_path / "run/distill.json").read_text())
    assert set(record["results"]["last"]) >= HELD
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run"))
    board.Reload()
    drawn = {e.step: e.value for e in board.Scalars("holdout_loss")}
    assert drawn == pytest.approx({r["step"]: r["holdout_loss"] for r in rows})


@pytest.mark.parametrize("whitening", ["layernorm", "standardize"])
def test_training_does_not_notice_the_measuring(
    teacher: Path, tmp_path: Path, whitening: str
) -> None:
    """A teacher with drop path, and a whitening with running statistics, as hard cases."""
    options: dict[str, Any] = {
        "teacher": {"spec": str(teacher), "drop_path": 0.2},
        "objective": {"whitening": whitening},
    }
    shape = {"name": "vit-t", **SHAPE, "drop_path": 0.3}
    for name, more in {
        "off": {"holdout": "none"},
        "on": {"holdout": "auto", "knn_data": "digits", "run": {"eval_every": 1}},
    }.items():
        featdistill.distill(
            student=shape, out=tmp_path / name, **{**TINY, "steps": 4, **options, **more}
        )
    assert not scores(tmp_path / "off")
    assert len(scores(tmp_path / "on")) == 5
    assert same(tmp_path / "off", tmp_path / "on")


def test_held_out_images_are_not_trained_on(teacher: Path, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "run", holdout="0.1")
    log = (tmp_path / "run/log.txt").read_text()
    assert "120 images taken out of the training images" in log
    assert "1,078 images of digits" in log  # 1198 less a tenth
    [file] = (tmp_path / "run/checkpoints").glob("step-*/manifest.json")
    manifest = json.loads(file.read_text())
    assert manifest["data_images"] == 1078


def test_knn_is_the_knn_commands_number(teacher: Path, tmp_path: Path) -> None:
    run = distill(teacher, tmp_path / "run", knn_data="digits", signal={"knn_k": 5})
    [logged] = [row["knn_top1"] for row in scores(run.out) if row["step"] == 6]
    told = featdistill.knn(models=[str(run.out)], data="digits", knn={"k": (5,)}, device="cpu")
    assert logged == told.top1[str(run.out)][5]


def test_knn_alone_with_a_label_budget(teacher: Path, tmp_path: Path) -> None:
    options = {"knn_data": "digits", "knn_labels": "3"}
    run = distill(teacher, tmp_path / "run", signal={"holdout": None, **options})
    rows = [row for row in read_metrics(run.out / "metrics.jsonl") if "knn_top1" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    log = " ".join((run.out / "log.txt").read_text().split())
    assert "kNN: 30 images of digits" in log


def test_the_best_state_is_the_one_with_the_best_score(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = iter([3.0, 9.0, 5.0, 4.0])
    real = module._Sums.result
    monkeypatch.setattr(
        module._Sums, "result", lambda *a: replace(real(*a), student_rank=next(ranks))
    )
    out = tmp_path / "run"
    distill(teacher, out, holdout="0.1", best="student_rank")
    monkeypatch.undo()
    found = read_best(out / "checkpoints/best")
    assert found is not None
    assert (found.step, found.manifest["value"]) == (2, 9.0)
    _check_best_export(out, found)


def _check_best_export(out: Path, best: Checkpoint) -> None:
    """`RUN/best` is what any command takes for a model, and knows its own story."""
    model = timm.create_model(f"local-dir:{out / 'best/export'}", pretrained=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, best.files["model"][f"student.model.{name}"]), name
    last = timm.create_model(f"local-dir:{out / 'export'}", pretrained=True)
    for name, value in last.state_dict().items():
        assert torch.equal(value, state(out)[f"model/student.model.{name}"]), name
    record = json.loads((out / "best/distill.json").read_text())["results"]
    assert (record["steps"], record["last"]["student_rank"]) == (2, 9.0)
    assert main(["export", str(out / "best"), "--to", "plain", "--out", str(out / "plain")]) == 0
    card = (out / "plain/README.md").read_text()
    assert "student_rank" in card
    assert "distill: after" in card


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_kill_while_measuring_changes_nothing(
    teacher: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies in its `at`-th measurement, and the run goes on from what is there."""
    options: dict[str, Any] = {"holdout": "0.1", "best": "holdout_loss"}
    options["run"] = {"checkpoint_every": 3}
    distill(teacher, tmp_path / "whole", **options)
    real, calls = module._Sums.result, []

    def die(self: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module._Sums, "result", die)
        with pytest.raises(KeyboardInterrupt):
            distill(teacher, tmp_path / "broken", **options)
    distill(teacher, tmp_path / "broken", resume=True, **options)
    assert same(tmp_path / "whole", tmp_path / "broken")
    assert scores(tmp_path / "whole") == scores(tmp_path / "broken")
    one, two = (read_best(tmp_path / n / "checkpoints/best") for n in ("whole", "broken"))
    assert one is not None
    assert two is not None
    assert one.manifest == two.manifest


def test_a_signal_while_measuring_saves_and_stops(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(teacher, tmp_path / "whole")
    real, calls = module._Sums.result, []

    def interrupt(self: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module._Sums, "result", interrupt)
        with pytest.raises(Interrupted, match="stopped at step 2"):
            distill(teacher, tmp_path / "broken")
    distill(teacher, tmp_path / "broken", resume=True)
    assert same(tmp_path / "whole", tmp_path / "broken")
    assert scores(tmp_path / "whole") == scores(tmp_path / "broken")


def test_a_run_from_before_the_signal_goes_on(teacher: Path, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "whole")
    out = tmp_path / "old"
    distill(teacher, out, schedule={"stop_at": 3})
    config = yaml.safe_load((out / "config.yaml").read_text())
    del config["signal"], config["run"]["best"]
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    distill(teacher, out, resume=True)
    assert same(tmp_path / "whole", out)


def test_a_resume_may_measure_otherwise_but_not_train_otherwise(
    teacher: Path, tmp_path: Path
) -> None:
    distill(teacher, tmp_path / "whole", holdout="0.1")
    out = tmp_path / "run"
    distill(teacher, out, holdout="0.1", schedule={"stop_at": 3})
    with pytest.raises(RunError, match=r"signal\.holdout: '0\.1' -> '0\.2'"):
        distill(teacher, out, holdout="0.2", resume=True)
    more: dict[str, Any] = {"knn_data": "digits", "best": "knn_top1", "run": {"eval_every": 1}}
    distill(teacher, out, holdout="0.1", resume=True, **more)
    assert same(tmp_path / "whole", out)
    assert read_best(out / "checkpoints/best") is not None


def test_the_alarm_rings_once_and_is_recorded(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("featdistill.tasks.signal.say", said.append)
    ranks = iter([10.0, 8.0, 2.0, 2.0])
    real = module._Sums.result
    monkeypatch.setattr(
        module._Sums, "result", lambda *a: replace(real(*a), student_rank=next(ranks))
    )
    distill(teacher, tmp_path / "run")
    assert [row["rank_alarm"] for row in scores(tmp_path / "run")] == [0, 0, 1, 1]
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == 1
    assert "2.0, it began with 10.0" in warnings[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"best": "holdout_los", "holdout": "0.1"}, "did you mean 'holdout_loss'"),
        ({"best": "knn_top1"}, "needs --knn-data"),
        ({"best": "holdout_loss", "holdout": "none"}, "needs a held-out slice"),
        ({"best": "holdout_loss"}, "by test images"),
        ({"signal": {"knn_labels": "3"}}, "without --knn-data"),
        ({"holdout": "1.5"}, "expected a share"),
    ],
    ids=str,
)
def test_mistakes_are_said_before_anything_is_written(
    teacher: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        distill(teacher, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
