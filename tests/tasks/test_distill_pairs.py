"""Distillation from every kind of teacher to every kind of student, end to end, on tiny models."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import featdistill
from featdistill.models.export import export_timm
from featdistill.models.students import SIZES, SwinSize
from featdistill.tasks.distill import DistillResult
from tests.models.formats.parity import Case
from tests.models.model_zoo import SWIN, images, small

VIT_STUDENT = {"name": "vit-t", "width": 32, "depth": 2, "heads": 2}


@dataclass(frozen=True)
class Pair:
    """A teacher's architecture, a student, and what the pairing must be.

    Attributes:
        teacher: timm architecture and arguments.
        student: the student section.
        size: pixels that the student sees.
        grids: (teacher, student) sides.
        layer: the teacher's stage that is learned, None for the last layer.
        left_out: prefix tokens without a partner.
    """

    teacher: tuple[str, dict[str, Any]]
    student: dict[str, Any]
    size: int
    grids: tuple[int, int]
    layer: int | None = None
    left_out: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


VIT = "vit_tiny_patch16_224"
PAIRS = {
    "ViT to ViT": Pair(
        (VIT, {}), {**VIT_STUDENT, "patch": 8}, size=32, grids=(4, 4), prefix=("cls",)
    ),
    "Swin to Swin V2": Pair(
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "patch_size": 4}),
        {"name": "swin-t"},
        size=64,
        grids=(2, 2),
    ),
    "Swin to ViT, by the stage with the student's grid": Pair(
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "patch_size": 4}),
        {**VIT_STUDENT, "patch": 16},
        size=64,
        grids=(4, 4),
        layer=2,
        left_out=("student.cls",),
    ),
    "ViT with registers to ViT without": Pair(
        (VIT, {"reg_tokens": 4, "no_embed_class": True}),
        {**VIT_STUDENT, "patch": 8},
        size=32,
        grids=(4, 4),
        prefix=("cls",),
        left_out=("teacher.reg1", "teacher.reg2", "teacher.reg3", "teacher.reg4"),
    ),
    "ConvNeXt to ViT": Pair(
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
        {**VIT_STUDENT, "patch": 16},
        size=64,
        grids=(4, 4),
        layer=2,
        left_out=("student.cls",),
        options={"teacher_image_size": 64},
    ),
    "ViT to ResNet": Pair(
        (VIT, {"img_size": 64, "patch_size": 16}),
        {"name": "timm/test_resnet"},
        size=64,
        grids=(4, 2),
        left_out=("teacher.cls",),
        options={"drop_path": 0},
    ),
    "patch 14 to patch 16": Pair(
        (VIT, {"img_size": 56, "patch_size": 14}),
        {**VIT_STUDENT, "patch": 16},
        size=64,
        grids=(4, 4),
        prefix=("cls",),
    ),
}
assert SWIN["window_size"] == 4  # of the Swin teachers


def teacher_of(pair: Pair, folder: Path) -> Path:
    architecture, arguments = pair.teacher
    if architecture.startswith("convnext"):
        from featdistill.models.backbone import TimmBuild
        from featdistill.models.students import build_fresh

        build = TimmBuild(architecture, {"num_classes": 0, **arguments})
        backbone = build_fresh(build, spec=architecture, image_size=64).eval()
    else:
        backbone = small(architecture, **arguments)
    return export_timm(backbone, folder / "teacher").folder


def distilled(folder: Path, pictures: Path, **options: Any) -> DistillResult:
    """A few steps on pictures of noise."""
    return featdistill.distill(
        data=pictures,
        batch_size=4,
        lr=1e-3,
        workers=0,
        device="cpu",
        out=folder / "run",
        run={"tensorboard": False},
        **options,
    )


@pytest.mark.parametrize("name", PAIRS)
def test_pair(name: str, tmp_path: Path, pictures: Path) -> None:
    pair = PAIRS[name]
    result = distilled(
        tmp_path,
        pictures,
        teacher=teacher_of(pair, tmp_path),
        student=pair.student,
        image_size=pair.size,
        steps=3,
        **pair.options,
    )
    record = json.loads((result.out / "distill.json").read_text())
    pairing = record["results"]["pairing"]
    teacher, student = pair.grids
    assert pairing["teacher_grid"] == [teacher, teacher]
    assert pairing["student_grid"] == [student, student]
    assert pairing["layer"] == pair.layer
    assert tuple(pairing["left_out"]) == pair.left_out
    assert tuple(pairing["prefix"]) == pair.prefix
    assert 0 < result.last["loss"] < 2
    assert result.export is not None
    learnt = featdistill.load_backbone(str(result.export))
    with torch.no_grad():
        features = learnt(images(2, pair.size))
    assert features.map.shape[2:] == (student, student)
    assert features.map.isfinite().all()


@pytest.mark.parametrize("case", ["dino-full", "clip-state", "esvit-w3", "fd-vit-pretrain"])
def test_from_a_checkpoint_file(case: str, tmp_path: Path, pictures: Path) -> None:
    path = Case.read(case).write(tmp_path)
    student = {**VIT_STUDENT, "patch": 16, "depth": 1}
    result = distilled(
        tmp_path,
        pictures,
        teacher=path,
        teacher_image_size=64 if case != "esvit-w3" else 96,
        student=student,
        target="pooled" if case == "clip-state" else "map",
        image_size=64,
        steps=2,
    )
    log = (result.out / "log.txt").read_text()
    assert "tensors, renamed" in log
    record = json.loads((result.out / "distill.json").read_text())
    assert record["results"]["teacher"]["report"]["total"] > 20
    assert path.name in record["results"]["teacher"]["weights"]


def test_a_student_that_timm_cannot_hold(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SwinV2-G's extra norms, small: what comes out is a plain export, and a model all the same."""
    size = SwinSize(32, (1, 1, 2, 1), (1, 2, 4, 8), window=4, end_norm_period=2)
    monkeypatch.setitem(SIZES, "swin-g", size)
    teacher = export_timm(small(VIT, img_size=64, patch_size=16), tmp_path / "teacher").folder
    result = distilled(
        tmp_path, pictures, teacher=teacher, student="swin-g", image_size=64, steps=2
    )
    assert result.export is not None
    learnt = featdistill.load_backbone(str(result.out))
    assert learnt.model.layers[2].blocks[1].enorm.weight.shape == (128,)
    with torch.no_grad():
        assert learnt(images(2, 64)).map.isfinite().all()
