"""Starts victims from a server that has imported everything, kills them, and compares runs."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featdistill.engine.checkpoint import Checkpoint, Checkpoints
from featdistill.engine.rundir import read_metrics
from tests.faults import victim

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.victim", "tests.faults.calm"])
PATIENCE = 120.0  # seconds after which something hangs
_MEASURED = {"images_per_second", "data_wait"}


class Victim:
    """A process that trains in a folder."""

    def __init__(
        self,
        folder: Path,
        *,
        target: Callable[[Path, dict[str, Any]], None] = victim.session,
        **options: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.process = CONTEXT.Process(target=target, args=(folder, options))
        self.process.start()

    def kill_when(self, ready: Callable[[], bool], number: int = signal.SIGKILL) -> bool:
        """Send a signal once something is so; whether the process was still there for it."""
        until = time.monotonic() + PATIENCE
        while not ready():
            if not self.process.is_alive():
                return False
            assert time.monotonic() < until, f"nothing happens in '{self.folder}'"
            time.sleep(0.0005)
        if not self.process.is_alive():
            return False
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return True

    def end(self) -> int:
        """The exit status; negative: the signal that ended it."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"it hangs: '{self.folder}'")
        assert self.process.exitcode is not None
        return self.process.exitcode


def finish(folder: Path, **options: Any) -> None:
    """A session to the run's end."""
    status = Victim(folder, **options).end()
    assert status == 0, f"status {status}: {said(folder)}"


def said(folder: Path) -> str:
    """What all sessions said."""
    file = folder / "said.txt"
    return file.read_text() if file.is_file() else ""


def rows_of(folder: Path) -> list[tuple[int, list[int], list[str]]]:
    """What was consumed, in order: (step, indices, hashes of views) of all sessions."""
    file = folder / "consumed.jsonl"
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return [(step, indices, views) for step, indices, views in map(json.loads, lines)]


def consumed(folder: Path) -> int:
    """How many steps were begun, over all sessions."""
    try:
        return (folder / "consumed.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def newest(folder: Path) -> Checkpoint:
    found = Checkpoints(folder / "checkpoints").latest()
    assert found is not None
    return found


def digest(folder: Path) -> dict[str, str]:
    """Hashes of all that a run ends with: state of every kind, best state, logged values."""
    last = newest(folder)
    assert last.step == victim.STEPS
    found = {name: last.manifest["sha256"][f"{name}.safetensors"] for name in last.files}
    best = sorted((folder / "checkpoints/best").glob("step-*"))
    assert len(best) == 1
    found["best"] = best[0].name + _sha((best[0] / "model.safetensors").read_bytes())
    logged = [
        {k: v for k, v in row.items() if k not in _MEASURED}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    found["logged"] = _sha(json.dumps(logged).encode())
    return found


def effective(folder: Path) -> list[tuple[int, list[int], list[str]]]:
    """What the final weights were made of: a session's rows count up to where the next began.

    Fails if a session skipped, repeated or reordered steps, or began after the last one begun.
    """
    rows: list[tuple[int, list[int], list[str]]] = []
    previous = -1
    for row in rows_of(folder):
        if row[0] != previous + 1:  # a new session, from a checkpoint
            assert row[0] <= previous + 1, f"a gap before step {row[0]} in '{folder}'"
            assert row[0] % 3 == 0 or row[0] == 0, "checkpoints are of every third step"
            rows = rows[: row[0]]
        rows.append(row)
        previous = row[0]
    assert [row[0] for row in rows] == list(range(len(rows)))
    return rows


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
