"""One launch at a time in a run's folder.

The lock is the kernel's (POSIX, on `.lock`): it ends with its process, however that ends, so that
no lock is ever stale; what the file says of its owner is for people. It holds over NFS too, but is
not passed to children: loading processes that outlive a run do not keep its folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from featdistill.core.errors import RunError
from featdistill.core.parsing import parse_json

LOCK = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")

# by device and inode, since closing *any* handle of a file gives up its POSIX lock
_held: dict[tuple[int, int], int] = {}


def claim(folder: Path) -> str | None:
    """Take a run's folder for this process, until `released` or its end.

    Returns:
        Something to tell: that a launch which was killed left its name there, or that the file
        system knows no locks.

    Raises:
        RunError: another process has it.
        OSError: the folder cannot be written.
    """
    if _key(folder) in _held:
        return None
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = _owner(handle)
        os.close(handle)
        if error.errno in _TAKEN:
            raise _in_use(folder, owner) from None
        return f"'{folder}' cannot be locked ({error.strerror}): start no second run in it"
    before = _owner(handle)
    me = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(me).encode(), 0)
    status = os.fstat(handle)
    _held[status.st_dev, status.st_ino] = handle
    return f"took '{folder}' over from {before}, which is no more" if before else None


def check_free(folder: Path) -> None:
    """Raise RunError if another process has a run's folder; writes nothing.

    Processes of one run but the first may look while that has it, and so do not.
    """
    if any(os.environ.get(name, "0") != "0" for name in _RANKS) or _key(folder) in _held:
        return
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # none, or it cannot be written, which claiming will say
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise _in_use(folder, _owner(handle)) from None
    finally:
        os.close(handle)


@contextmanager
def released() -> Iterator[None]:
    """Give up, after a block, what was claimed in it."""
    before = set(_held)
    try:
        yield
    finally:
        for key in set(_held) - before:
            handle = _held.pop(key)
            with suppress(OSError):  # the disk may be gone
                os.ftruncate(handle, 0)
            os.close(handle)


def _key(folder: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(folder / LOCK)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _owner(handle: int) -> str:
    """Who wrote the file; empty if nobody did, or was through."""
    try:
        said = parse_json(os.pread(handle, 4096, 0))
        return f"process {int(said['pid'])} on {said['host']!s:.80} (since {said['since']!s:.40})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _in_use(folder: Path, owner: str) -> RunError:
    return RunError(
        f"output folder '{folder}' is in use by {owner or 'another process'}",
        fix="wait for it or stop it, or give another --out",
    )
