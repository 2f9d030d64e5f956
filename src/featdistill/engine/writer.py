"""Writes in the background: the loop goes on while a checkpoint goes to the disk.

What is written is a copy, taken between two steps. One write is in flight at a time; a step's
writes follow each other, and a later step waits for them before it takes its copy, so that there is
never more than one step's state in memory beside the run's own.

There is no thread between writes: loading processes are forked then, and a fork takes along no lock
that a thread holds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Abandoned(Exception):
    """A write was ended between two files, because the run ends at once."""


class Writer:
    """Does what it is given in another thread, in the order given; a `with` block.

    After an error nothing more is written, and `wait` raises it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given: deque[Callable[[], object]] = deque()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._abandoned = threading.Event()
        self._error: BaseException | None = None
        self._step = -1

    @property
    def failed(self) -> bool:
        """Whether a write failed; waits for none."""
        return self._error is not None

    def go_on(self) -> None:
        """Called in the thread between files. Raises Abandoned if no more is wanted."""
        if self._abandoned.is_set():
            raise Abandoned

    def room_for(self, step: int) -> None:
        """Wait for what earlier steps had to write."""
        if step != self._step:
            self.settle()
            self._step = step

    def add(self, work: Callable[[], object]) -> None:
        """Have some work done."""
        with self._lock:
            self._given.append(work)
            if not self._busy:
                self._busy = True
                self._thread = threading.Thread(target=self._work, name="checkpoint writer")
                self._thread.start()

    def wait(self) -> None:
        """Wait until all is written. Raises what a write raised."""
        self.settle()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Wait until nothing is being written, well or badly."""
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._given or self.failed:
                    self._given.clear()
                    self._busy = False
                    return
                work = self._given.popleft()
            try:
                self.go_on()
                work()
            except BaseException as error:
                self._error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Wait for what is in flight; a second Ctrl-C leaves it after the file at hand."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._abandoned.set()
        self.settle()
