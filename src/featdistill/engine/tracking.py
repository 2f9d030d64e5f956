"""What a run says of itself: metrics.jsonl, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from featdistill.core.errors import RunError
from featdistill.core.records import sync
from featdistill.engine.rundir import read_metrics

log = logging.getLogger("featdistill")
console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """A line for the person at the terminal, and for the run's log."""
    log.info(message)
    console.print(Text(message))


class MetricsLog:
    """metrics.jsonl and TensorBoard events.

    Args:
        folder: the run's.
        resume_at: drop lines of later steps, which a resumed run writes again.
        tensorboard: write events too.
        first: whether this is the process that writes; the others' calls do nothing.
    """

    def __init__(
        self, folder: Path, *, resume_at: int = 0, tensorboard: bool = True, first: bool = True
    ) -> None:
        self._file: Any = None
        self._board: Any = None
        if not first:
            return
        file = self._path = folder / "metrics.jsonl"
        try:
            kept = [row for row in read_metrics(file) if row["step"] <= resume_at]
            text = "".join(json.dumps(row) + "\n" for row in kept) if resume_at else ""
            # never a moment without the lines so far: a kill may come between any two calls
            begun = file.with_name(f".{file.name}.tmp")
            begun.write_text(text, encoding="utf-8")
            sync(begun)
            os.replace(begun, file)
            self._file = open(file, "ab", buffering=0)  # noqa: SIM115 - closed below
        except OSError as error:
            raise self._refused(error) from None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=resume_at + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars of a step (1 is the first)."""
        if self._file is None:
            return
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._refused(error) from None
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Wait until the lines so far are on the disk, before a checkpoint of their step is."""
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write '{self._path}' ({error.strerror or error})",
            fix="make room, then go on with the same command and --resume",
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


class Bar:
    """A progress bar on a terminal; a line now and then where there is none."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title, self.quiet = title, quiet
        self._live = console.is_terminal and not quiet
        self._last = 0.0
        self._steps = 0
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start(self, steps: int, done: int) -> None:
        self._steps, self._last = steps, time.monotonic()
        if self._live:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[text]}"),
                console=console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=steps, completed=done, text="")

    def update(self, step: int, text: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, text=text)
        elif not self.quiet and time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            print(f"{self.title} {step}/{self._steps} {text}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Countdown:
    """A bar that says how much time is left, from the speed so far."""

    def __init__(self, title: str, total: int, unit: str, *, quiet: bool = False) -> None:
        self.total, self.unit = total, unit
        self.began = time.monotonic()
        self.bar = Bar(title, quiet=quiet)
        self.bar.start(total, 0)

    def update(self, done: int) -> None:
        """So many of the total are done."""
        left = (time.monotonic() - self.began) / max(done, 1) * (self.total - done)
        self.bar.update(done, f"{self.unit}  left {duration(left)}")

    def stop(self) -> None:
        """Remove the bar."""
        self.bar.stop()


def duration(seconds: float) -> str:
    """`3 s`, `4:05 min`, `2:30 h`, `3.2 days`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"
    if seconds < 48 * 3600:
        return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"
    return f"{seconds / 86400:.1f} days"
