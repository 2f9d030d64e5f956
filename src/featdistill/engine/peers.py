"""Several processes of one run share one fate: what goes wrong in one is said once, and ends all.

A process that fails alone (its images cannot be read, its memory is too small) would leave the
others waiting for it, in an exchange that nothing can interrupt, until the communication library
gives up. So it leaves a note where all look for one; whoever then still waits ends itself. No harm
is done: a run survives kill -9 at any instant.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featdistill.core.errors import FeatDistillError, RunError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_LOOK = 0.25  # seconds between two looks for a note
_GRACE = 2.0  # seconds in which a process may end by itself once there is one
_STAY = 15.0  # seconds that the first waits for the others, of which one may have been killed
_LINGER = 10.0  # seconds that a process waits for the one that started it to go
_NOTE, _GONE, _PROCESS = "note", "gone", "process"


@dataclass(frozen=True)
class _Note:
    """What ended a process, and with it all.

    Attributes:
        rank: whose mistake it was.
        text: in one line.
        status: what the processes exit with.
    """

    rank: int
    text: str
    status: int


class Peers:
    """This process among the others.

    Args:
        store: that all processes reach, and that nobody else writes to.
        first: whether the store is in this process, which then must go last.
    """

    def __init__(self, store: Store, *, rank: int, world: int, first: bool) -> None:
        self._store, self._rank, self._world, self._first = store, rank, world, first
        self._gone = threading.Event()
        self._seen: _Note | None = None
        self._starter: int | None = None  # of the others, once this process ends with an error
        store.set(f"{_PROCESS}/{socket.gethostname()}/{os.getpid()}", "")
        atexit.register(self.linger)  # after the line is said
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def failed(self, error: BaseException) -> BaseException:
        """Tell the others.

        Returns:
            What this process shall end with: the first mistake of all processes. One that another
            process has, and says, is marked as said.
        """
        mine = _Note(self._rank, _line(error), _status(error))
        try:
            note = self._note() if _is_loss(error) else self._agree(mine)
            if note is None:  # someone is gone who left no note
                lost = _lost()
                note = self._agree(_Note(self._rank, str(lost), lost.exit_code))
                error = lost
        except RuntimeError:  # the first process is gone, and the store with it
            note = self._seen
        if note is None:
            return _lost() if _is_loss(error) else error
        self._leave(badly=True)
        if note.rank == self._rank:
            return error
        if not isinstance(error, FeatDistillError) or str(error) != note.text:
            error = _Another(note)
        error.said = True
        return error

    def done(self) -> None:
        """This process has come to its end without a mistake."""
        self._leave(badly=False)

    def linger(self) -> None:
        """Before the end of the process: the first keeps the store until all others are through.

        And none ends with an error before one that started it: that would be killed for it, in the
        midst of saying why (Lightning's launcher).
        """
        atexit.unregister(self.linger)
        if not self._gone.is_set():
            return
        until = time.monotonic() + (_STAY if self._first else _LINGER)
        with suppress(RuntimeError):  # the store is gone
            while time.monotonic() < until and not self._may_go():
                time.sleep(_LOOK / 5)

    def _may_go(self) -> bool:
        if self._first:
            return self._store.add(_GONE, 0) >= self._world
        return self._starter is None or os.getppid() != self._starter

    def _agree(self, note: _Note) -> _Note:
        """The first note of all processes; it is this one if there was none yet."""
        return _Note(**json.loads(self._store.compare_set(_NOTE, "", json.dumps(vars(note)))))

    def _note(self) -> _Note | None:
        """A note that is there, or comes soon."""
        until = time.monotonic() + 4 * _LOOK
        while not self._store.check([_NOTE]):
            if time.monotonic() > until:
                return None
            time.sleep(_LOOK / 5)
        return _Note(**json.loads(self._store.get(_NOTE)))

    def _leave(self, *, badly: bool) -> None:
        if self._gone.is_set():
            return
        self._gone.set()
        parent = os.getppid()
        with suppress(RuntimeError):  # the store is gone
            if badly and self._store.check([f"{_PROCESS}/{socket.gethostname()}/{parent}"]):
                self._starter = parent
            self._store.add(_GONE, 1)

    def _watch(self) -> None:
        """In a thread: end this process if another one failed and the main thread cannot see it."""
        with suppress(RuntimeError):  # the first process is gone: the next exchange says so
            while not self._gone.wait(_LOOK):
                if not self._store.check([_NOTE]):
                    continue
                self._seen = note = self._note()
                assert note is not None
                if self._gone.wait(_GRACE):
                    return
                self._leave(badly=True)
                self.linger()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(note.status)


class _Another(FeatDistillError):
    """Another process's mistake."""

    def __init__(self, note: _Note) -> None:
        super().__init__(note.text)
        self.exit_code = note.status


def _line(error: BaseException) -> str:
    if isinstance(error, FeatDistillError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())


def _status(error: BaseException) -> int:
    """What a process exits with, as the command line has it."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, OSError) else getattr(error, "exit_code", 1)


def _is_loss(error: BaseException) -> bool:
    """Whether an error says no more than that another process does not answer."""
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return True
    # torch has no class of its own for gloo's
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def _lost() -> RunError:
    return RunError(
        "another process of this run ended without a word",
        fix="see whether memory was short or it was killed, then go on with the same command and "
        "--resume",
    )


_within = False
_current: Peers | None = None


def join(*, rank: int, world: int, token: str) -> None:
    """Become one of several processes that share a fate; outside of `one_fate`, nothing is done.

    Args:
        token: the same in all processes of this run, and in no other's.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    global _current
    if not _within:
        return
    # torch.distributed was set up: it has put there where its store is
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False)
    prefixed = PrefixStore(f"featdistill/{token}", store)
    _current = Peers(prefixed, rank=rank, world=world, first=rank == 0)


@contextmanager
def one_fate() -> Iterator[None]:
    """A block whose mistakes become those of all processes that `join`ed in it."""
    global _within, _current
    outer, _within = _within, True
    try:
        yield
    except BaseException as error:
        peers, _current = _current, None
        if peers is None:
            raise
        ended = peers.failed(error)
        if ended is error:
            raise
        raise ended from None
    finally:
        _within = outer
    peers, _current = _current, None
    if peers is not None:
        peers.done()
