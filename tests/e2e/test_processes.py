"""Two processes (gloo) take the same steps as one: same order, same masks, same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from featdistill.data.open import open_data
from featdistill.data.views import EvalView
from featdistill.models.load import load_backbone

WORDS = [
    *("--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", "random"),
    *("--teacher-image-size", "32", "--student", "vit-t", "--student.width", "64"),
    *("--student.depth", "2", "--student-patch", "4", "--drop-path", "0.3"),
    *("--image-size", "16", "--data", "digits", "--batch-size", "16", "--steps", "4"),
    *("--lr", "1e-3", "--workers", "0", "--device", "cpu"),
    *("--run.log_every", "1", "--run.tensorboard", "false"),
]


def featdistill(*words: str) -> None:
    command = [sys.executable, "-m", "featdistill", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def rows(out: Path, *more: str) -> list[dict[str, float]]:
    featdistill("distill", *WORDS, "--out", str(out), *more)
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


def test_processes_and_micro_batches_change_only_rounding(tmp_path: Path) -> None:
    """With a held-out slice that two processes cannot share evenly."""
    held = ("--holdout", "61")
    one = rows(tmp_path / "one", *held)
    two = rows(tmp_path / "two", *held, "--run.devices", "2", "--run.micro_batches", "2")
    names = ("loss", "holdout_loss", "holdout_explained_variance", "student_rank", "teacher_rank")
    for name, times in zip(names, (4, 5, 5, 5, 5), strict=True):
        alone, together = ([row[name] for row in run if name in row] for run in (one, two))
        assert len(alone) == times
        assert together == pytest.approx(alone, rel=1e-4), name


def test_two_processes_score_every_image_once(tmp_path: Path) -> None:
    """599 images, 300 + 299: the record is what one process finds, image by image."""
    out = tmp_path / "run"
    featdistill(
        *("finetune", "--weights", "random", "--data", "digits"),
        *("--image-size", "32", "--batch-size", "64", "--steps", "8", "--out", str(out)),
        *("--model", "timm/vit_tiny_patch16_224", "--lr", "1e-3", "--workers", "0"),
        *("--device", "cpu", "--run.devices", "2", "--run.tensorboard", "false"),
    )
    got = json.loads((out / "finetune.json").read_text())["results"]
    arrays = np.load(out / "finetune.npz")
    held, classifier = open_data("digits").held_out, load_backbone(str(out)).eval()
    view = EvalView(32, 0.875)
    with torch.no_grad():
        logits = torch.cat(
            [classifier(view(held.read(i))[0][None].float() / 255).logits for i in range(len(held))]
        )
    labels, predictions = torch.from_numpy(held.labels), logits.argmax(1)
    assert got["images"] == len(held) == 599
    assert np.array_equal(arrays["labels"], held.labels)
    assert np.array_equal(arrays["predictions"], predictions.numpy())
    hits = predictions == labels
    fives = [int((row > row[y]).sum()) < 5 for row, y in zip(logits, labels, strict=True)]
    assert got["top1"] == pytest.approx(hits.double().mean())
    assert got["top5"] == pytest.approx(sum(fives) / 599)
    assert got["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4
    )
    for c, row in enumerate(got["by_class"]):
        mine = labels == c
        assert row["images"] == int(mine.sum()), row
        assert row["accuracy"] == pytest.approx(hits[mine].double().mean())
