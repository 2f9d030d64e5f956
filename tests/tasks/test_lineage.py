"""Where a model came from, by the records of its runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import featdistill
from featdistill.models.load import load_backbone
from featdistill.tasks.lineage import Lineage, lineage
from tests.tasks.conftest import SHAPE, TINY


def of(spec: Path | str, **options: Any) -> Lineage:
    return lineage(load_backbone(str(spec), **options).origin, str(spec))


def test_a_run_and_its_export_have_one_past(student: Path) -> None:
    found = of(student)
    assert [(s.kind, s.name) for s in found.stages] == [
        ("distill", "student"),
        ("pretrain", "teacher"),
    ]
    assert (found.unknown, found.title) == ((), None)
    record = json.loads((student / "distill.json").read_text())["results"]
    assert found.stages[0].images_seen == record["images_seen"] == 6 * 32
    assert found.stages[0].seconds == record["seconds"]
    assert of(student / "export") == found
    assert of(student / "export" / "model.safetensors") == found


def test_a_teacher_that_is_gone_is_unknown(student: Path, teacher: Path, tmp_path: Path) -> None:
    for name, run in (("teacher", teacher), ("student", student)):
        shutil.copytree(run, tmp_path / name)
    record = json.loads((tmp_path / "student/distill.json").read_text())
    record["config"]["teacher"]["spec"] = str(tmp_path / "teacher")
    (tmp_path / "student/distill.json").write_text(json.dumps(record))
    assert of(tmp_path / "student").unknown == ()
    shutil.rmtree(tmp_path / "teacher")
    assert of(tmp_path / "student").unknown == ("teacher",)


def test_random_weights_cost_nothing_and_others_are_unknown(tmp_path: Path, teacher: Path) -> None:
    fresh = of("timm/resnet18", weights="random")
    assert (fresh.stages, fresh.unknown) == ((), ())
    file = shutil.copy(teacher / "export/model.safetensors", tmp_path / "strange.safetensors")
    shutil.copy(teacher / "export/config.json", tmp_path / "strange.json")
    found = of(file)
    assert (found.stages, found.unknown) == ((), ("strange.safetensors",))


@pytest.mark.parametrize(
    ("rounds", "target", "title"),
    [
        (1, "map", None),
        (1, "gap", "Distilled on pooled features"),
        (1, "pooled", "Distilled on features as the teacher pools them"),
        (1, "logits", "Distilled on logits"),
        (2, "map", "Second round"),
        (2, "logits", "Second round, on logits"),
        (3, "map", "Third round"),
        (4, "map", "Round 4"),
    ],
)
def test_what_a_student_is_called(
    rounds: int, target: str, title: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own target, and by how many of its teachers were students."""
    chain = [Path(f"student-{n}") for n in range(rounds)] + [Path("first")]

    def record(run: Path) -> dict[str, Any]:
        place = chain.index(run)
        if run.name == "first":
            return {"pretrain": {"config": {}, "results": {}}}
        config = {
            "objective": {"target": target if place == 0 else "gap"},
            "teacher": {"spec": str(chain[place + 1])},
            "student": {"init": "random"},
        }
        return {"distill": {"config": config, "results": {}}}

    monkeypatch.setattr("featdistill.tasks.lineage.records_of", record)
    monkeypatch.setattr("featdistill.tasks.lineage.run_of", lambda before: Path(before.spec))
    origin = featdistill.load_backbone("timm/resnet18", weights="random").origin
    found = lineage(origin, "student-0")
    assert found.title == title
    assert len(found.stages) == rounds + 1


def test_logits_of_a_fine_tuned_teacher_are_a_target(classifier: Path, tmp_path: Path) -> None:
    """End to end: the student of a classifier's logits, and its past of four runs."""
    out = tmp_path / "logits"
    featdistill.distill(
        teacher=classifier,
        student={"name": "vit-t", **SHAPE},
        target="logits",
        steps=2,
        out=out,
        **TINY,
    )
    found = of(out)
    assert found.title == "Distilled on logits"
    assert [s.kind for s in found.stages] == ["distill", "finetune", "distill", "pretrain"]


def test_of_the_best_student_the_whole_run_counts(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    featdistill.distill(
        teacher=teacher,
        student={"name": "vit-t", **SHAPE},
        steps=4,
        out=out,
        holdout=64,
        best="holdout_loss",
        **TINY,
    )
    record = json.loads((out / "best/distill.json").read_text())
    record["results"]["images_seen"] = 32  # as if its first step had been the best
    (out / "best/distill.json").write_text(json.dumps(record))
    (first, *_) = of(out / "best").stages
    assert (first.name, first.images_seen) == ("run", 4 * 32)
