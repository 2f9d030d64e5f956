"""`featdistill export`: the command, and the story that its model card tells."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import featdistill
from featdistill.cli.main import main
from featdistill.core.errors import ModelError, RunError
from featdistill.core.records import read_record, write_json
from featdistill.models.backbone import Origin
from featdistill.tasks.provenance import story_of
from tests.models.formats.parity import Case

from .conftest import SHAPE, TINY


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("to", ["timm", "plain", "official"])
def test_a_run_in_each_format(
    to: str, student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(["export", "--model", str(student), "--to", to, "--out", str(out)]) == 0
    said = " ".join(caplog.text.split())
    assert "differs by 0 of the largest value" in said
    assert "(tolerance 1e-05)" in said
    file = "ckpt_featdistill.pth" if to == "official" else ""
    images = torch.rand(2, 3, 8, 8)
    ours = featdistill.load_backbone(str(student))(images).map
    # two heads of 16 channels: the official file does not say so, its configuration does
    if to != "official":
        assert torch.equal(featdistill.load_backbone(str(out / file))(images).map, ours)


def test_the_card_tells_how_the_student_was_made(
    student: Path, teacher: Path, tmp_path: Path
) -> None:
    featdistill.export(model=student, to="plain", out=tmp_path / "out")
    text = card(tmp_path / "out")
    assert "- method: feature distillation (arXiv 2205.14141)" in text  # from the run's own card
    assert "- teacher: teacher (model.safetensors" in text
    assert "- configuration: image 8, batch 32" in text
    assert "- method (teacher): SimCLR (arXiv 2002.05709)" in text  # the teacher's own story
    assert "## Results so far\n\n- distill: after 6 steps" in text
    assert "- teacher: made from random weights" in text  # nobody's licence
    assert str(teacher.parent) not in text


def test_the_card_tells_how_a_checkpoint_file_was_read(tmp_path: Path) -> None:
    path = Case.read("dino-full").write(tmp_path)
    featdistill.export(model=path, out=tmp_path / "first")
    featdistill.export(model=tmp_path / "first", to="plain", out=tmp_path / "second")
    for text in (card(tmp_path / "first"), card(tmp_path / "second")):
        assert "- read as: plain ViT, as DINO, " in text
        assert "; loaded 30 of 38 tensors, renamed 0, resized 0, left out 8 (head.*)" in text
        assert "- assumed: the normalisation, mean 0.485" in text


def test_the_card_tells_the_results(classifier: Path, tmp_path: Path) -> None:
    top1 = read_record(classifier / "finetune.json", "finetune")["results"]["top1"]
    # an export of an export keeps the story
    featdistill.export(model=classifier / "export", out=tmp_path / "first")
    text = card(tmp_path / "first")
    assert f"- fine-tuned: top-1 {top1:.2%}" in text
    assert "- method (student): feature distillation (arXiv 2205.14141)" in text
    assert "- teacher (student): " in text
    assert "- method (teacher) (student): SimCLR" in text
    featdistill.export(model=tmp_path / "first", to="plain", out=tmp_path / "second")
    second = card(tmp_path / "second")
    assert "- method (student): feature distillation (arXiv 2205.14141)" in second
    assert f"- which was exported from: {classifier.name} (" in second
    assert f"- fine-tuned: top-1 {top1:.2%}" in second
    assert "- teacher: made from random weights" in second
    featdistill.export(model=tmp_path / "second", out=tmp_path / "third")
    assert f"before that {classifier.name} (" in card(tmp_path / "third")
    assert f"- fine-tuned: top-1 {top1:.2%}" in card(tmp_path / "third")


def test_the_runs_own_cards_tell_the_licences(
    student: Path, teacher: Path, classifier: Path, continued: Path
) -> None:
    for run in (teacher, student, classifier, continued):
        assert "- teacher: made from random weights" in card(run / "export")
    assert "- gift: not known. Ask" in card(continued / "export")


def test_licence_of_a_known_teacher(student: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    for file in (student / "export").iterdir():
        (run / "export" / file.name).write_bytes(file.read_bytes())
    record = read_record(student / "distill.json", "distill")
    record["config"]["teacher"]["spec"] = "timm/vit_base_patch16_224.mae"
    record["results"]["teacher"] |= {
        "weights": "timm hub: vit_base_patch16_224.mae",
        "licence": None,
    }
    write_json(run / "distill.json", record)
    featdistill.export(model=run, out=tmp_path / "out")
    assert "- timm/vit_base_patch16_224.mae: CC-BY-NC-4.0. No commercial use." in card(
        tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("weights", "licence"),
    [("random (seed 0)", "made from random weights"), ("mine.pth (sha256 0123)", "not known")],
)
def test_the_catalogue_licenses_the_hubs_weights_only(
    weights: str, licence: str, student: Path
) -> None:
    backbone = featdistill.load_backbone(str(student))
    spec = "timm/vit_base_patch16_224.mae"
    backbone.origin = Origin(spec, weights)
    found = story_of(spec, backbone).licences[spec]
    assert (found or "not known") == licence


@pytest.fixture(scope="module")
def continued(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that continued from a checkpoint of somebody's."""
    folder = tmp_path_factory.mktemp("continued")
    featdistill.export(model=student, to="plain", out=folder / "gift")
    (folder / "gift" / "story.json").unlink()
    featdistill.distill(
        teacher=teacher,
        student={"name": "vit-t", **SHAPE, "init": str(folder / "gift")},
        steps=2,
        out=folder / "run",
        **TINY,
    )
    return folder / "run"


def test_weights_that_the_student_continued_from(continued: Path, tmp_path: Path) -> None:
    assert "- continued from: gift (model.safetensors" in card(continued / "export")
    featdistill.export(model=continued, out=tmp_path / "out")
    text = card(tmp_path / "out")
    assert "- continued from: gift (model.safetensors" in text
    assert "- gift: not known. Ask" in text
    assert "- teacher: made from random weights" in text
    assert str(continued.parent) not in text


def test_another_folder_of_an_ancestors_name(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "student"
    shutil.copytree(student, copy)
    record = read_record(copy / "distill.json", "distill")
    record["config"]["teacher"]["spec"] = "pre"
    write_json(copy / "distill.json", record)
    shutil.copytree(student, tmp_path / "pre")  # no such weights as those of the teacher
    monkeypatch.chdir(tmp_path)
    featdistill.export(model="student", out=tmp_path / "out")
    text = card(tmp_path / "out")
    assert "- records of pre: no longer there" in text
    assert "(pre)" not in text
    assert "- pre: not known. Ask" in text


def test_refusals_come_in_one_line(student: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a BEiT-style ViT nor a Swin V2"):
        featdistill.export(model=teacher, to="official", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="not empty"):
        featdistill.export(model=student, out=student)


def test_an_unknown_format(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--model", str(student), "--out", str(tmp_path / "out"), "--to", "onxx"]
    assert main(words) == 2
    assert "onnx" in capsys.readouterr().err
