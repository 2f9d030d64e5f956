"""`featdistill export`: the command, and the story that its model card tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import featdistill
from featdistill.cli.main import main
from featdistill.core.errors import ModelError, RunError
from featdistill.core.records import read_record, write_json


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
    assert f"- teacher: {teacher}" in text
    assert "- configuration: image 8, batch 32" in text
    assert "- method (teacher): SimCLR (arXiv 2002.05709)" in text  # the teacher's own story
    assert "## Results so far\n\n- distill: after 6 steps" in text
    assert f"- {teacher}: made from random weights" in text  # nobody's licence


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
    assert f"- which was exported from: {classifier / 'export'}" in second


def test_licence_of_a_known_teacher(student: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    for file in (student / "export").iterdir():
        (run / "export" / file.name).write_bytes(file.read_bytes())
    record = read_record(student / "distill.json", "distill")
    record["config"]["teacher"]["spec"] = "timm/vit_base_patch16_224.mae"
    record["results"]["teacher"]["licence"] = None
    write_json(run / "distill.json", record)
    featdistill.export(model=run, out=tmp_path / "out")
    assert "- timm/vit_base_patch16_224.mae: CC-BY-NC-4.0. No commercial use." in card(
        tmp_path / "out"
    )


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
