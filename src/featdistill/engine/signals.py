"""Ctrl-C, SIGTERM and SIGUSR1 end a run at the next step boundary, with its state saved."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Which signal asked for the end, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch signals that ask for an end; a second one acts at once, as it always did."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers = {s: signal.getsignal(s) for s in _STOPPING}
    # a shell's background jobs ignore Ctrl-C, and nohup's: what is ignored stays so
    before = {s: handler for s, handler in handlers.items() if handler is not signal.SIG_IGN}

    def ask(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shielded(begin: Callable[[int], None] | None) -> Callable[[int], None]:
    """What a loading process begins with: `begin`, and a shield from signals.

    Those sent to the whole group are the training process's to answer: a scheduler that ends a job
    tells all of its processes, and with the workers gone, the training process could not finish its
    step. Its own SIGTERM to a worker still ends that.
    """

    def both(worker: int) -> None:
        if begin is not None:
            begin(worker)
        _shield()

    return both


def _shield() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while True:
        told = signal.sigwaitinfo({signal.SIGTERM})
        if told.si_pid == parent or os.getppid() != parent:
            os._exit(0)


def requeue() -> str | None:
    """Under SLURM, put this job back into the queue.

    Returns:
        What became of that, in a line; None where there is no SLURM job.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"WARNING: job {job} was not requeued ({error})"
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"status {done.returncode}"
        return f"WARNING: job {job} was not requeued (scontrol: {said})"
    return f"job {job} is requeued"
