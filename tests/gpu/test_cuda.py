"""What only a CUDA device can show; skipped where there is none (`make test-gpu`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import featdistill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OPTIONS: dict[str, Any] = {
    "teacher": "timm/vit_tiny_patch16_224",
    "teacher_weights": "random",
    "teacher_image_size": 32,
    "student": {"name": "vit-t", "patch": 4, "depth": 2},
    "image_size": 16,
    "data": "digits",
    "batch_size": 32,
    "steps": 8,
    "lr": 1e-3,
    "workers": 0,
}


def losses(out: Path) -> list[float]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_float32_on_cuda_takes_the_steps_of_the_cpu(tmp_path: Path) -> None:
    run = {"log_every": 1, "tensorboard": False}
    for device in ("cpu", "cuda"):
        options = {**OPTIONS, "device": device, "precision": "float32"}
        featdistill.distill(out=tmp_path / device, run=run, **options)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


def test_bf16_is_near_float32(tmp_path: Path) -> None:
    run = {"log_every": 1, "tensorboard": False}
    for precision in ("float32", "bf16"):
        options = {**OPTIONS, "device": "cuda", "precision": precision}
        featdistill.distill(out=tmp_path / precision, run=run, **options)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "float32"), rel=0.05)
