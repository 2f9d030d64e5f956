"""finetune takes whatever `load_backbone` takes, and says in a line what is wrong with the rest."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import featdistill
from featdistill.core.errors import FeatDistillError, ModelError, RunError
from featdistill.models.backbone import CustomBackbone, Origin
from tests.models.formats.parity import Case
from tests.tasks.conftest import SHAPE, TINY

OPTIONS = {**TINY, "steps": 1, "drop_path": 0.0}


class Net(nn.Module):
    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def whole() -> CustomBackbone:
    return CustomBackbone(Net(), image_size=8, origin=Origin("whole", "random"))


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "users_own", sys.modules[__name__])
    return "users_own"


def scored(out: Path, model: str | Path, **options: object) -> int:
    featdistill.finetune(model=model, out=out, **{**OPTIONS, **options})
    return json.loads((out / "finetune.json").read_text())["results"]["images"]


def test_a_timm_name(tmp_path: Path) -> None:
    name = "timm/vit_tiny_patch16_224"
    assert scored(tmp_path / "o", name, weights="random", image_size=32) == 599


def test_runs_and_exports_and_files(teacher: Path, tmp_path: Path) -> None:
    places = [teacher, teacher / "export", teacher / "export/model.safetensors"]
    assert [scored(tmp_path / str(i), p) for i, p in enumerate(places)] == [599] * 3


def test_an_official_checkpoint_file(tmp_path: Path) -> None:
    file = Case.read("mae-encoder").write(tmp_path)
    assert scored(tmp_path / "o", file, image_size=32) == 599


@pytest.mark.parametrize("name", ["Net", "whole"])
def test_a_factory(factory: str, tmp_path: Path, name: str) -> None:
    out = tmp_path / "o"
    assert scored(out, f"{factory}:{name}") == 599
    says = r"has no export: its model cannot be built by plain timm"
    with pytest.raises(RunError, match=says):
        featdistill.finetune(model=out, out=tmp_path / "p", **OPTIONS)


def test_a_fine_tuned_model(student: Path, tmp_path: Path) -> None:
    assert scored(tmp_path / "a", student, ema=0.9) == 599
    assert scored(tmp_path / "b", tmp_path / "a") == 599
    assert scored(tmp_path / "c", tmp_path / "a/export-ema", head="keep") == 599


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("timm/vit_tny_patch16_224", "did you mean 'timm/vit_tiny_patch16_224'"),
        ("nowhere.pth", "nowhere.pth"),
        ("users_own:whol", "did you mean .whole."),
        ("users_own:Origin", "cannot be called without arguments"),
        ("no.such.module:thing", "cannot import 'no.such.module'"),
    ],
)
def test_what_is_no_model(factory: str, tmp_path: Path, spec: str, says: str) -> None:
    with pytest.raises(FeatDistillError, match=says) as caught:
        featdistill.finetune(model=spec, out=tmp_path / "o", **OPTIONS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_drop_path_where_there_is_none(factory: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no drop path of timm's; give --drop-path 0"):
        featdistill.finetune(
            model=f"{factory}:Net", out=tmp_path / "o", **{**OPTIONS, "drop_path": 0.1}
        )


@pytest.fixture(scope="module")
def student(teacher: Path) -> Path:
    out = teacher.parent / "for-specs"
    featdistill.distill(
        teacher=teacher, student={"name": "vit-t", **SHAPE}, steps=1, out=out, **TINY
    )
    return out
