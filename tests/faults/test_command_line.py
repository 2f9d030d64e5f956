"""Real starts: the command itself is killed, and goes on with --resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from featdistill.engine.rundir import read_metrics
from tests.faults.harness import PATIENCE, newest

WORDS = [
    *("distill", "--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", "random"),
    *("--teacher-image-size", "32", "--student", "vit-t", "--student.width", "64"),
    *("--student.depth", "2", "--student-patch", "4", "--drop-path", "0.3"),
    *("--image-size", "16", "--data", "digits", "--batch-size", "16", "--steps", "24"),
    *("--lr", "1e-3", "--workers", "2", "--device", "cpu", "--run.preflight", "false"),
    *("--run.log_every", "4", "--run.checkpoint_every", "3", "--run.tensorboard", "false"),
]


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "featdistill", *WORDS, "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def to_the_end(out: Path, *more: str) -> None:
    process = start(out, *more)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@pytest.mark.faults
@pytest.mark.parametrize("cache", [(), ("--teacher-cache-views", "1")], ids=["live", "cached"])
def test_a_killed_command_goes_on_to_the_same_run(tmp_path: Path, cache: tuple[str, ...]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    folders = [("--teacher-cache", str(tmp_path / name)) if cache else () for name in "ab"]
    mine, its = ((*folder, *cache) for folder in folders)
    to_the_end(whole, *mine)
    process = start(broken, *its)
    until = time.monotonic() + PATIENCE
    while len([row for row in read_metrics(broken / "metrics.jsonl") if "loss" in row]) < 3:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (broken / "distill.json").exists()
    to_the_end(broken, "--resume", *its)
    ended, want = newest(broken), newest(whole)
    assert ended.step == want.step == 24
    assert ended.manifest["sha256"] == want.manifest["sha256"]
    losses = [
        [{k: row[k] for k in ("step", "loss") if k in row} for row in read_metrics(file)]
        for file in (whole / "metrics.jsonl", broken / "metrics.jsonl")
    ]
    assert losses[0] == losses[1]
    assert json.loads((broken / "distill.json").read_text())["results"]["steps"] == 24


@pytest.mark.faults
def test_a_command_killed_while_the_teacher_fills_its_cache(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    views = ("--teacher-cache-views", "3", "--steps", "160")  # of 74 steps an epoch
    to_the_end(whole, "--teacher-cache", str(tmp_path / "a"), *views)
    for attempt in range(3):
        more = ("--resume",) if attempt else ()
        process = start(broken, "--teacher-cache", str(tmp_path / "b"), *views, *more)
        until = time.monotonic() + PATIENCE
        while len(list((tmp_path / "b").rglob("shard-*"))) <= 3 * attempt:
            assert time.monotonic() < until
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    to_the_end(broken, "--teacher-cache", str(tmp_path / "b"), *views, "--resume")
    assert newest(broken).manifest["sha256"] == newest(whole).manifest["sha256"]
    files = [
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
        for name in "ab"
    ]
    assert files[0] == files[1]
