"""Several students of one teacher's pass: each is the student of its run alone, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import featdistill
from featdistill.cli.main import main
from featdistill.config.resolve import resolve
from featdistill.core.errors import ConfigError, Interrupted, ModelError, NonFiniteError, RunError
from featdistill.core.types import Batch, Loss
from featdistill.engine.checkpoint import Checkpoints
from featdistill.engine.loop import _Loop
from featdistill.engine.rundir import read_metrics
from featdistill.models.backbone import Backbone
from featdistill.models.load import load_backbone
from featdistill.objectives.distillation import FeatureDistillation
from featdistill.tasks.assembly import assemble_all, students_of
from tests.tasks.conftest import TINY
from tests.tasks.test_distill_task import differing, losses

BASE: dict[str, Any] = {**TINY, "steps": 6, "holdout": "40", "drop_path": 0.3}
RUN: dict[str, Any] = {"log_every": 1, "tensorboard": False, "preflight": False}
RUN |= {"precision": "float32"}  # auto would choose for both together
PAIR = ("vit-t", "vit-s")
NARROW = {"depth": 1, "patch": 4}


def distill(teacher: Path, out: Path, *names: str, **options: Any) -> Any:
    run = {**RUN, **options.pop("run", {})}
    given = {**BASE, **options}
    shape = {"name": names if len(names) > 1 else names[0], **NARROW}
    return featdistill.distill(teacher=teacher, student=shape, out=out, run=run, **given)


@pytest.fixture(scope="module")
def together(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several") / "both"
    distill(teacher, out, *PAIR)
    return out


@pytest.fixture(scope="module")
def alone(teacher: Path, together: Path) -> Path:
    for name in PAIR:
        distill(teacher, together.parent / "alone" / name, name)
    return together.parent / "alone"


def same(one: Path, other: Path) -> bool:
    """Whether two students have the same bits, and logged the same values."""
    names = ("step", "loss", "cosine", "grad_norm", "holdout_loss", "student_rank")
    logged = [
        [{k: row[k] for k in names if k in row} for row in read_metrics(run / "metrics.jsonl")]
        for run in (one, other)
    ]
    return differing(one, other) == [] and logged[0] == logged[1] != []


def test_each_is_the_student_of_its_run_alone(together: Path, alone: Path) -> None:
    for name in PAIR:
        assert same(together / name, alone / name), name


def test_the_comparison_can_fail(together: Path, alone: Path) -> None:
    assert differing(together / "vit-t", alone / "vit-s")
    assert losses(together / "vit-t") != losses(alone / "vit-s")


@pytest.mark.parametrize(
    "options",
    [
        {"run": {"micro_batches": 4}},
        {"whitening": "standardize"},
        {"whitening": "pca", "target": "gap"},
        {"teacher": {"drop_path": 0.2}},
        {"workers": 2},
    ],
    ids=str,
)
def test_whatever_the_options(teacher: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"holdout": "none", "steps": 3, **options}
    taught_by: Any = {"spec": str(teacher), **options.pop("teacher", {})}
    distill(taught_by, tmp_path / "both", *PAIR, **options)
    for name in PAIR:
        distill(taught_by, tmp_path / "alone" / name, name, **options)
        assert differing(tmp_path / "both" / name, tmp_path / "alone" / name) == [], name


def test_the_teacher_is_asked_once_a_step(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = [], FeatureDistillation.teacher_features

    def count(self: FeatureDistillation, batch: Batch, *rest: Any) -> Any:
        asked.append(len(batch))
        return real(self, batch, *rest)

    monkeypatch.setattr(FeatureDistillation, "teacher_features", count)
    distill(teacher, tmp_path / "run", "vit-t", "vit-s", "vit-t", holdout="none")
    assert asked == [BASE["batch_size"]] * BASE["steps"]


# --- what is left behind


def test_each_folder_is_a_run_of_its_own(together: Path) -> None:
    for name in PAIR:
        kept = {p.name for p in (together / name).iterdir()}
        assert kept >= {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints"}
        assert kept >= {"export", "distill.json", "weights.json"}
        config = yaml.safe_load((together / name / "config.yaml").read_text())
        assert config["student"]["name"] == name
        assert config["run"]["out"] == str(together / name)
        record = json.loads((together / name / "distill.json").read_text())
        [other] = set(PAIR) - {name}
        assert record["results"]["together_with"] == [other]
    assert (together / "log.txt").read_text().count("held out   vit-t: loss") == 7
    config = yaml.safe_load((together / "config.yaml").read_text())
    assert config["student"]["name"] == list(PAIR)


def test_a_single_student_is_what_it_was(alone: Path) -> None:
    record = json.loads((alone / "vit-t/distill.json").read_text())
    assert "together_with" not in record["results"]
    assert record["config"]["student"]["name"] == "vit-t"


def test_the_result_has_each_student(teacher: Path, tmp_path: Path) -> None:
    found = distill(teacher, tmp_path / "run", *PAIR, holdout="none", steps=2)
    assert list(found.students) == list(PAIR)
    assert found.export is None
    for name, student in found.students.items():
        assert student.export == tmp_path / "run" / name / "export"
        assert student.last["loss"] > 0
    assert found.steps == 2


def test_compare_and_report_take_a_students_folder(
    teacher: Path, together: Path, tmp_path: Path
) -> None:
    featdistill.compare(
        teacher=teacher,
        student=together / "vit-t",
        also=[str(together / "vit-s")],
        out=tmp_path / "compared",
        steps=2,
        seeds=[1],
        lrs=[1.0],
        **{k: v for k, v in TINY.items() if k != "lr"},
    )
    page = featdistill.write_report(together / "vit-t", together / "vit-s", out=tmp_path / "page")
    assert "vit-s" in Path(page).read_text(encoding="utf-8")
    page = featdistill.write_report(together, out=tmp_path / "whole")
    assert "vit-s" in Path(page).read_text(encoding="utf-8")


def test_the_run_of_several_is_no_model(together: Path) -> None:
    with pytest.raises(RunError, match=r"of several students; give one of them: .*/vit-s or "):
        load_backbone(str(together))


def test_names_of_folders() -> None:
    names = ("vit-t", "timm/vit_tiny_patch16_224", "vit-t", "vit-t", "timm/a:b/c")
    config: Any = resolve("check", {"teacher": "x", "data": "digits", "student": names})
    found = students_of(config)
    assert list(found) == ["vit-t", "vit_tiny_patch16_224", "vit-t-2", "vit-t-3", "a-b-c"]
    assert [c.student.name for c in found.values()] == list(names)


def test_one_student_given_as_a_list_is_one() -> None:
    config: Any = resolve("check", {"teacher": "x", "data": "digits", "student": ["vit-s"]})
    assert config.student.name == "vit-s"
    assert students_of(config) == {"student": config}


def test_check_shows_all(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--student", "vit-t", "--student", "vit-s", "--student.depth", "1"]
    words += ["--teacher", str(teacher), "--student-patch", "4", "--data", "digits"]
    words += ["--image-size", "8", "--batch-size", "8", "--steps", "2", "--workers", "0"]
    assert main(["check", *words, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    [head] = [line for line in out.splitlines() if line.split()[:1] == ["teacher"]]
    assert head.split() == ["teacher", "vit-t", "vit-s"]
    [width] = [line for line in out.splitlines() if line.startswith("width")]
    assert width.split() == ["width", "32", "192", "384"]
    assert "projector  vit-t: linear, 192 to 32 channels" in out
    assert "projector  vit-s: linear, 384 to 32 channels" in out


# --- stopped, killed, resumed


def test_stopped_and_resumed(teacher: Path, together: Path, tmp_path: Path) -> None:
    stopped = distill(teacher, tmp_path / "run", *PAIR, schedule={"stop_at": 2})
    assert stopped.steps == 2
    assert [s.export for s in stopped.students.values()] == [None, None]
    distill(teacher, tmp_path / "run", *PAIR, resume=True)
    for name in PAIR:
        assert same(tmp_path / "run" / name, together / name), name


def test_a_signal_stops_all_after_the_same_step(
    teacher: Path, together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = _Loop._step, 0

    def interrupt(self: _Loop, *rest: Any) -> None:
        nonlocal count
        real(self, *rest)
        count += 1
        if count == 3:  # in the first student's second step
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(_Loop, "_step", interrupt)
    with pytest.raises(Interrupted, match=r"the states of all are saved.*--resume") as stopped:
        distill(teacher, tmp_path / "run", *PAIR)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    steps = {n: Checkpoints(tmp_path / "run" / n / "checkpoints").steps() for n in PAIR}
    assert len({tuple(s) for s in steps.values()}) == 1
    monkeypatch.setattr(_Loop, "_step", real)
    distill(teacher, tmp_path / "run", *PAIR, resume=True)
    for name in PAIR:
        assert same(tmp_path / "run" / name, together / name), name


@pytest.mark.parametrize("keep", [1, 2])
def test_killed_between_two_students_checkpoints(
    teacher: Path, together: Path, tmp_path: Path, keep: int
) -> None:
    """The first has saved step 4, the second only step 2: it alone takes two steps."""
    options: dict[str, Any] = {"run": {"checkpoint_every": 2, "checkpoint_keep": keep}}
    child = os.fork()
    if child == 0:
        real, count = Checkpoints.save, 0

        def save(self: Checkpoints, *rest: Any) -> Path:
            nonlocal count
            count += 1
            if count == 4:
                os._exit(9)
            return real(self, *rest)

        Checkpoints.save = save  # type: ignore[method-assign]
        try:
            distill(teacher, tmp_path / "run", *PAIR, **options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    newest = [Checkpoints(tmp_path / "run" / n / "checkpoints").steps()[-1] for n in PAIR]
    assert newest == [4, 2]
    distill(teacher, tmp_path / "run", *PAIR, resume=True, **options)
    for name in PAIR:
        assert same(tmp_path / "run" / name, together / name), name


def test_killed_before_the_second_had_a_folder(
    teacher: Path, together: Path, tmp_path: Path
) -> None:
    distill(teacher, tmp_path / "run", *PAIR, schedule={"stop_at": 2})
    shutil.rmtree(tmp_path / "run/vit-s")
    distill(teacher, tmp_path / "run", *PAIR, resume=True)
    for name in PAIR:
        assert differing(tmp_path / "run" / name, together / name) == [], name


def test_other_students_are_no_resume(teacher: Path, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "run", *PAIR, schedule={"stop_at": 2}, holdout="none")
    with pytest.raises(RunError, match=r"student\.name: \['vit-t', 'vit-s'\] -> 'vit-t'"):
        distill(teacher, tmp_path / "run", "vit-t", resume=True, holdout="none")


# --- each for itself


def test_one_that_is_no_number_does_not_touch_the_other(
    teacher: Path, together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FeatureDistillation.forward

    def poisoned(self: FeatureDistillation, batch: Batch) -> Loss:
        loss = real(self, batch)
        assert batch.stream is not None
        narrow = self.student.width == 192
        return (
            Loss(loss.total * torch.nan, loss.parts) if narrow and batch.stream.step == 3 else loss
        )

    monkeypatch.setattr(FeatureDistillation, "forward", poisoned)
    with pytest.raises(NonFiniteError):
        distill(teacher, tmp_path / "run", *PAIR)
    assert same(tmp_path / "run/vit-s", together / "vit-s")
    assert (tmp_path / "run/vit-s/export").is_dir()
    assert not (tmp_path / "run/vit-t/export").exists()
    log = (tmp_path / "run/log.txt").read_text()
    assert "'vit-t' ends here, the others go on" in log


def test_each_keeps_its_best(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    distill(teacher, out, *PAIR, run={"best": "holdout_loss", "eval_every": 2})
    for name in PAIR:
        record = json.loads((out / name / "best/distill.json").read_text())
        assert record["config"]["student"]["name"] == name
        assert (out / name / "best/export").is_dir()


def test_from_a_teacher_cache(teacher: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"holdout": "none"}
    options["teacher_cache"] = {"folder": str(tmp_path / "cache"), "views": 2}
    distill(teacher, tmp_path / "both", *PAIR, **options)
    for name in PAIR:
        distill(teacher, tmp_path / "alone" / name, name, **options)
        assert differing(tmp_path / "both" / name, tmp_path / "alone" / name) == [], name


SWIN_TEACHER = {
    "spec": "timm/swin_tiny_patch4_window7_224",
    "weights": "random",
    "image_size": 64,
}


def test_students_of_different_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT learns Swin's third stage, a Swin its last: of one pass all the same."""
    asked: list[int] = []
    real = Backbone.forward

    def count(self: Backbone, *rest: Any, **more: Any) -> Any:
        if "swin_tiny" in self.origin.spec:
            asked.append(1)
        return real(self, *rest, **more)

    options: dict[str, Any] = {"image_size": 64, "batch_size": 2, "steps": 1, "holdout": "none"}
    options |= {"teacher": SWIN_TEACHER, "drop_path": 0.0}
    names = ("vit-t", "swin-t")
    given = {**BASE, **options, "run": RUN}
    config: Any = resolve("distill", {**given, "student": names, "out": str(tmp_path / "x")})
    layers = [a.objective.pairing.layer for a in assemble_all(students_of(config))]
    assert layers == [2, None]
    monkeypatch.setattr(Backbone, "forward", count)
    featdistill.distill(student=names, out=tmp_path / "both", **given)
    before = len(asked)
    for name in names:
        featdistill.distill(student=name, out=tmp_path / "alone" / name, **given)
        assert differing(tmp_path / "both" / name, tmp_path / "alone" / name) == [], name
    assert len(asked) - before == 2 * before
    kept = {"folder": str(tmp_path / "cache")}
    with pytest.raises(ModelError, match=r"different layers .*vit-t: 2, swin-t: the last"):
        featdistill.distill(student=names, out=tmp_path / "no", teacher_cache=kept, **given)


def test_no_student_at_all() -> None:
    with pytest.raises(ConfigError, match="no student is named"):
        resolve("check", {"teacher": "x", "data": "digits", "student": []})


def test_twins_are_named(teacher: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {**BASE, "teacher": teacher, "steps": 1}
    featdistill.check(student={"name": ("vit-t", "vit-t"), **NARROW}, **options)
    said = "vit-t and vit-t-2 are one and the same student, and will stay so"
    assert said in capsys.readouterr().out
    featdistill.check(student={"name": PAIR, **NARROW}, **options)
    assert "one and the same" not in capsys.readouterr().out
