"""Loading processes that are killed, that hang, or whose parent dies."""

from __future__ import annotations

import ctypes
import os
import re
import signal
from typing import Any

import torch
from torch.utils.data import get_worker_info

from featdistill.core.errors import DataError

_PATIENCE = 600  # seconds to wait for a batch; even a sleeping network disk has woken up by then
_MOST = 256  # loading processes whose image can be told
_NOTHING = -1
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h
_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(.*)", re.DOTALL)


class AtWork:
    """Which image each loading process is reading, for the parent to see."""

    def __init__(self) -> None:
        self._images = torch.full((_MOST,), _NOTHING, dtype=torch.int64).share_memory_()

    def on(self, index: int) -> None:
        """This process begins to read an image."""
        self._note(index)

    def done(self) -> None:
        """This process is through with it."""
        self._note(_NOTHING)

    def _note(self, index: int) -> None:
        worker = get_worker_info()
        if worker is not None and worker.id < _MOST:
            self._images[worker.id] = index

    def images(self) -> list[int]:
        """The images that are being read."""
        return [i for i in self._images.tolist() if i != _NOTHING]


def processes(workers: int) -> dict[str, Any]:
    """A DataLoader's options for so many loading processes."""
    return {
        "num_workers": workers,
        "timeout": _PATIENCE if workers else 0,
        "worker_init_fn": _Dies(os.getpid()) if workers else None,
    }


class _Dies:
    """Ends a loading process with its parent, even one that hangs and cannot look for itself."""

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self, _: int) -> None:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != self.parent:  # it died before
            os.kill(os.getpid(), signal.SIGKILL)


def trouble_of(error: RuntimeError, dataset: Any) -> DataError | None:
    """What torch's loader says of its processes, in one line; None if it is about something else.

    Args:
        dataset: with a `source`, and `at_work` in which its processes say what they read; None
            where the error came up somewhere else: a dead process interrupts whatever is going on.
    """
    text = str(error)
    reading, name = "", "the images"
    if dataset is not None:
        name = f"'{dataset.source.name}'"
        images = [f"'{dataset.source.identify(i)}'" for i in dataset.at_work.images()[:4]]
        reading = f" while reading {', '.join(images)}" if images else ""
    if text.startswith("DataLoader timed out"):
        return DataError(
            f"no batch of {name} came for {_PATIENCE} seconds: its loading processes hang{reading}",
            fix="look at that image and its disk, or give --workers 0 to see where it hangs",
        )
    if isinstance(error.__cause__, RuntimeError) and _DEAD.match(str(error.__cause__)):
        text = str(error.__cause__)  # which knows the signal
    dead = _DEAD.match(text)
    if dead is None:
        return None
    how = dead[2].strip().rstrip(".").partition(". ")[0]
    how = how.removeprefix("is ").removeprefix("exited unexpectedly").strip() or "ended"
    return DataError(
        f"a loading process (pid {dead[1]}) of {name} died ({how}){reading}",
        fix="see whether memory is short (give fewer --workers), and look at those images",
    )
