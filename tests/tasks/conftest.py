"""A tiny teacher and student, made once by the commands themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import featdistill

TINY: dict[str, Any] = {
    "data": "digits",
    "image_size": 8,
    "batch_size": 32,
    "workers": 0,
    "device": "cpu",
    "lr": 1e-3,
}
SHAPE: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "patch": 4}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "teacher"
    featdistill.pretrain(
        model={"name": "vit-t", **SHAPE}, steps=6, out=out, run={"tensorboard": False}, **TINY
    )
    return out


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a dozen images of noise."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = torch.Generator().manual_seed(0)
    for i in range(12):
        pixels = torch.randint(0, 256, (80, 80, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def student(teacher: Path) -> Path:
    out = teacher.parent / "student"
    featdistill.distill(
        teacher=teacher, student={"name": "vit-t", **SHAPE}, steps=6, out=out, **TINY
    )
    return out


@pytest.fixture(scope="session")
def classifier(student: Path) -> Path:
    out = student.parent / "classifier"
    featdistill.finetune(
        model=student, steps=6, out=out, view={"randaugment": None}, mix={"mixup": 0.0}, **TINY
    )
    return out
