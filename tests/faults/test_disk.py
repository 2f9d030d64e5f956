"""A disk that is full, forbidden or limited: a clear line, and the checkpoints as they were."""

from __future__ import annotations

import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from featdistill.core.errors import RunError
from featdistill.engine.checkpoint import Checkpoints
from featdistill.engine.lock import released
from featdistill.engine.rundir import open_run, read_metrics
from featdistill.engine.tracking import MetricsLog
from tests.engine.test_rundir import _own_log, config  # noqa: F401 - its log is put back
from tests.faults.harness import Victim, digest, finish, newest, rows_of, said
from tests.faults.victim import session


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 6, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("stopped")
    finish(folder, resume=False, stop_at=6)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """The newest checkpoints (a better best may come meanwhile), and what is half written."""
    places = [*(folder / "checkpoints").glob("step-*"), *(folder / "checkpoints").glob(".*")]
    files = (p for place in places for p in place.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def limited(folder: Path, options: dict[str, Any]) -> None:
    """A session that may not write files larger than a limit; writes then fail with EFBIG."""
    limit = options.pop("limit")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    session(folder, options)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_limit_on_the_size_of_files(
    share: float, stopped: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = content(folder)
    largest = max(len(data) for data in before.values())
    limit = int(share * largest)
    assert limit > 2048, "the log and the metrics fit"
    assert Victim(folder, target=limited, resume=True, limit=limit).end() == 2
    assert content(folder) == before
    lines = [line for line in said(folder).splitlines() if "RunError" in line]
    assert len(lines) == 1
    assert "cannot write the checkpoint" in lines[0]
    assert "File too large" in lines[0]
    assert "make room" in lines[0]
    finish(folder, resume=True)
    assert digest(folder) == digest(undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip(f"file systems may not be mounted here ({done.stderr.strip()})")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # even if something is open


def test_a_full_disk(stopped: Path, undisturbed: Path, small_disk: Path) -> None:
    folder = Path(shutil.copytree(stopped, small_disk / "run"))
    before = content(folder)
    room = shutil.disk_usage(small_disk).free
    assert room > 20_000, "the disk holds the run"
    (small_disk / "ballast").write_bytes(bytes(room - 12_000))
    assert Victim(folder, resume=True).end() == 2
    assert content(folder) == before
    assert "cannot write the checkpoint" in said(folder)
    assert "No space left on device" in said(folder)
    (small_disk / "ballast").unlink()
    finish(folder, resume=True)
    assert digest(folder) == digest(undisturbed)


def test_a_full_disk_for_the_metrics(small_disk: Path) -> None:
    metrics = MetricsLog(small_disk, tensorboard=False)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))

    def fill() -> None:
        for step in range(10_000):
            metrics.write(step, {"loss": 1.0})

    with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl' \(No space left.*make room"):
        fill()
    (small_disk / "ballast").unlink()
    metrics.close()
    rows = read_metrics(small_disk / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows))), "what was written is whole"


def test_a_disk_that_is_read_only(small_disk: Path) -> None:
    out = small_disk / "run"
    with released():  # its lock, and the log below: a file that is open for writing keeps a disk
        open_run(str(out), config(out), resume=False)  # from becoming read-only
    store = Checkpoints(out / "checkpoints")
    store.save(1, {"model": {"w": torch.ones(3)}}, {})
    before = content(out)
    for handler in logging.getLogger("featdistill").handlers:
        handler.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        with pytest.raises(RunError, match=r"cannot write the checkpoint .*Read-only file system"):
            store.save(2, {"model": {"w": torch.ones(3)}}, {})
        with pytest.raises(RunError, match=r"cannot write .*Read-only file system"):
            open_run(str(out), config(out, resume=True), resume=True)
        with pytest.raises(RunError, match=r"cannot write .*Read-only file system"):
            MetricsLog(out, tensorboard=False)
        found = store.latest()
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert found is not None
    assert content(out) == before


SCRIPT = """
import os, sys
from pathlib import Path
from unittest.mock import patch
from featdistill.core.errors import RunError
from featdistill.engine import checkpoint
from tests.faults.victim import run

folder, real = Path(sys.argv[1]), checkpoint.save_file

def save_file(tensors, file):
    if file.parent.name.endswith("step-00000006"):
        raise OSError(28, "No space left on device")
    real(tensors, file)

status = 0
with patch.object(checkpoint, "save_file", save_file):
    try:
        run(folder, resume=False, devices=2)
    except RunError as error:
        print(error)
        status = error.exit_code
(folder / f"status-{os.environ.get('LOCAL_RANK', '0')}").write_text(str(status))
sys.exit(status)
"""


@pytest.mark.faults
def test_a_full_disk_of_the_first_process_ends_both_after_the_same_step(tmp_path: Path) -> None:
    """The first writes in the background; the other hears of it as of a signal."""
    script, folder = tmp_path / "train.py", tmp_path / "run"
    script.write_text(SCRIPT)
    folder.mkdir()
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert (folder / "status-0").read_text() == (folder / "status-1").read_text() == "2"
    assert done.stdout.count("No space left on device); make room") == 2
    assert newest(folder).step == 3
    steps = sorted(step for step, _, _ in rows_of(folder))
    assert steps == sorted(2 * list(range(len(steps) // 2))), "each process took each step once"
    assert 6 <= len(steps) // 2 <= 10, "at the latest a step after the next one due"
