"""Two processes (gloo) take the same steps as one: same order, same masks, same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = [
    *("--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", "random"),
    *("--teacher-image-size", "32", "--student", "vit-t", "--student.width", "64"),
    *("--student.depth", "2", "--student-patch", "4", "--drop-path", "0.3"),
    *("--image-size", "16", "--data", "digits", "--batch-size", "16", "--steps", "4"),
    *("--lr", "1e-3", "--workers", "0", "--device", "cpu"),
    *("--run.log_every", "1", "--run.tensorboard", "false"),
]


def losses(out: Path, *more: str) -> list[float]:
    command = [sys.executable, "-m", "featdistill", "distill", *WORDS, "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def test_processes_and_micro_batches_change_only_rounding(tmp_path: Path) -> None:
    one = losses(tmp_path / "one")
    assert len(one) == 4
    two = losses(tmp_path / "two", "--run.devices", "2", "--run.micro_batches", "2")
    assert two == pytest.approx(one, rel=1e-4)
