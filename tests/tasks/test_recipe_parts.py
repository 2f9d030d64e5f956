"""Every recipe can be built: students at their own size without memory, the rest tiny; and the
chain behind 89.0 % runs from end to end, each step on the last one's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import featdistill
from featdistill.config.commands import CompareConfig, DistillConfig, FinetuneConfig
from featdistill.config.resolve import read_recipe, recipe_names, resolve
from featdistill.engine.runtime import Runtime
from featdistill.models.load import load_backbone
from featdistill.models.students import build_student
from featdistill.models.timm_models import check_name
from featdistill.tasks.common import schedule_of
from featdistill.tasks.finetune import classification

GIVEN: dict[str, dict[str, Any]] = {
    "distill": {"teacher": "timm/vit_tiny_patch16_224", "data": "digits", "out": "x"},
    "finetune": {"model": "m", "data": "digits", "out": "x"},
    "compare": {"teacher": "t", "student": "s", "data": "digits", "out": "x"},
    "pretrain": {"data": "digits", "out": "x"},
}


def named(*commands: str) -> list[str]:
    return [n for n in recipe_names() if read_recipe(n)["command"] in commands]


def resolved(name: str) -> Any:
    recipe = read_recipe(name)
    given = dict(GIVEN[recipe["command"]])
    if "teacher" in recipe:
        given.pop("teacher", None)
    if "path" in recipe.get("data", {}):
        given.pop("data")
    return resolve(recipe["command"], given, recipe=name)


@pytest.mark.parametrize("name", named("distill"))
def test_students_build(name: str) -> None:
    config: DistillConfig = resolved(name)
    check_name(config.teacher.spec.removeprefix("timm/"))
    wanted, size = config.student, config.view.image_size
    with torch.device("meta"):
        student = build_student(
            wanted.name,
            image_size=size,
            patch=wanted.patch,
            drop_path=wanted.drop_path,
            width=wanted.width,
            depth=wanted.depth,
            heads=wanted.heads,
        )
    assert student.image_size == (size, size)
    assert student.grid[0] * student.patch == size


@pytest.mark.parametrize("name", named("finetune", "compare"))
def test_classifiers_build(name: str) -> None:
    config: FinetuneConfig | CompareConfig = resolved(name)
    body = load_backbone("timm/vit_tiny_patch16_224", weights="random", image_size=32)
    runtime = Runtime(device="cpu")
    objective = classification(body, config, classes=("a", "b"), runtime=runtime)
    assert objective.classifier.num_classes == 2
    schedule = schedule_of(
        config.schedule, config.optimizer, images=50_000, batch_size=config.data.batch_size
    )
    assert 0 <= schedule.warmup < schedule.steps
    assert schedule.final < schedule.peak


def test_the_chain_behind_89(tmp_path: Path) -> None:
    """Tiny and on digits, but with the recipes' own sections: only sizes and lengths differ."""
    small = {"workers": 0, "device": "cpu", "batch_size": 32, "steps": 1}
    shape = {"width": 32, "depth": 2, "heads": 2, "patch": 4}
    at = {"image_size": 8, "data": "digits", **small}
    run = tmp_path / "fd-clip-vit-l"
    featdistill.distill(
        recipe="fd-clip-vit-l",
        teacher="timm/vit_tiny_patch16_224",
        teacher_weights="random",
        teacher_image_size=32,
        student=shape,
        out=run,
        **at,
    )
    steps = [("ft-clip-vit-l-22k", 8), ("ft-clip-vit-l-22k-1k", 8), ("ft-clip-vit-l-336", 12)]
    for name, size in steps:
        out = tmp_path / name
        # ImageNet-22K has other classes than ImageNet-1K: digits under other names
        data = "digits" if name != "ft-clip-vit-l-22k" else renamed(tmp_path / "other")
        options = {**at, "image_size": size, "data": data}
        featdistill.finetune(recipe=name, model=run, out=out, **options)
        run = out
    last = load_backbone(str(run))
    assert (last.image_size, last.num_classes) == ((12, 12), 10)
    said = [(tmp_path / n / "log.txt").read_text() for n, _ in steps]
    assert ["its own classifier" in text for text in said] == [False, False, True]
    config = json.loads((run / "finetune.json").read_text())["config"]
    assert config["optimizer"]["layer_decay"] == 0.9
    assert config["mix"]["mixup"] == 0


def renamed(root: Path) -> str:
    from PIL import Image

    for part in ("train", "val"):
        for name in ("x", "y"):
            (root / part / name).mkdir(parents=True)
            for i in range(16):
                Image.new("RGB", (10, 10), (i, 40, 90)).save(root / part / name / f"{i}.png")
    return str(root)
