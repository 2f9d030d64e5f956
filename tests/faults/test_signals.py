"""Signals: a run stops at a step boundary, saved, with the documented status, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from featdistill.engine import checkpoint, loop
from featdistill.engine.checkpoint import Checkpoints
from tests.faults.harness import PATIENCE, Victim, digest, finish, newest, rows_of, said
from tests.faults.victim import STEPS, Restless, session

NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
PLACES = ["forward", "saving", "evaluation"]


def send(numbers: list[int]) -> None:
    """One signal after the other: two at once would be one."""
    for number, more in zip(numbers, [*numbers[1:], None], strict=True):
        handler = signal.getsignal(number)
        os.kill(os.getpid(), number)
        until = time.monotonic() + PATIENCE
        # a write is in another thread than the handler, which takes its own place to the next one
        while more is not None and signal.getsignal(number) == handler:
            assert time.monotonic() < until
            time.sleep(0.0005)


def told(place: str, numbers: list[int], *, at: int = 2) -> list[Any]:
    """Patches by which a process signals itself in the midst of something, the `at`-th time."""
    times = 0

    def during(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal times
            times += 1
            if times == at:
                send(numbers)
            return real(*arguments, **more)

        return call

    homes = {
        "forward": (Restless, "forward"),
        "saving": (checkpoint, "save_file"),
        "evaluation": (loop._Loop, "_evaluate"),
    }
    home, name = homes[place]
    return [patch.object(home, name, during(getattr(home, name)))]


def signalled(folder: Path, options: dict[str, Any]) -> None:
    """A session that is told so."""
    place, numbers = options.pop("place"), options.pop("numbers")
    os.environ |= options.pop("environment", {})
    for patched in told(place, numbers):
        patched.start()
    session(folder, options)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.faults)])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", NUMBERS)
def test_one_signal(
    number: int, place: str, workers: int, undisturbed: Path, tmp_path: Path
) -> None:
    victim = Victim(
        tmp_path, target=signalled, resume=False, place=place, numbers=[number], workers=workers
    )
    assert victim.end() == 128 + number
    # while step 3 is saved the loop goes on, to step 6 at most; what comes then is read at step 7
    steps = {"forward": {2}, "saving": {4, 5, 6, 7}, "evaluation": {14}}
    stopped = len(rows_of(tmp_path))
    assert stopped in steps[place]
    assert newest(tmp_path).step == stopped, "what was asked for in a write is saved too"
    assert f"stopped at step {stopped} of {STEPS}; the state is saved" in said(tmp_path)
    finish(tmp_path, resume=True, workers=workers)
    assert digest(tmp_path) == digest(undisturbed)
    assert rows_of(tmp_path) == rows_of(undisturbed), "no step was done twice"


@pytest.mark.parametrize("place", PLACES)
def test_a_second_ctrl_c_ends_at_once(place: str, undisturbed: Path, tmp_path: Path) -> None:
    victim = Victim(
        tmp_path, target=signalled, resume=False, place=place, numbers=[signal.SIGINT] * 2
    )
    assert victim.end() == 130
    ended = {"forward": {1}, "saving": {3, 4, 5, 6}, "evaluation": {14}}[place]
    assert len(rows_of(tmp_path)) in ended
    steps = Checkpoints(tmp_path / "checkpoints").steps()
    # quick steps are at the evaluation of the 14th while the 12th's checkpoint is being written
    saved = {"forward": [[]], "saving": [[], [3]], "evaluation": [[6, 9], [9, 12]]}[place]
    assert steps in saved, "nothing more was saved than what was being written"
    finish(tmp_path, resume=True)
    assert digest(tmp_path) == digest(undisturbed)


def whole_group(folder: Path, options: dict[str, Any]) -> None:
    """A session in a process group of its own, which is told as a whole, loading processes too."""
    os.setpgid(0, 0)
    number = options.pop("number")
    real, times = Restless.forward, 0

    def forward(self: Restless, batch: Any) -> Any:
        nonlocal times
        times += 1
        if times == 5:
            os.killpg(0, number)
        return real(self, batch)

    with patch.object(Restless, "forward", forward):
        session(folder, options)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_to_the_whole_group(number: int, undisturbed: Path, tmp_path: Path) -> None:
    """As a terminal's Ctrl-C and a scheduler's SIGTERM are: workers do not die under the run."""
    victim = Victim(tmp_path, target=whole_group, resume=False, number=number, workers=2)
    assert victim.end() == 128 + number, said(tmp_path)
    assert newest(tmp_path).step == 5
    finish(tmp_path, resume=True, workers=2)
    assert digest(tmp_path) == digest(undisturbed)


@pytest.mark.parametrize(
    ("array", "status", "said_so"),
    [
        ({}, 0, "job 77 is requeued"),
        ({"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "4"}, 0, "job 70_4 is requeued"),
        ({}, 1, "WARNING: job 77 was not requeued (scontrol: no such job)"),
    ],
)
def test_sigusr1_requeues_a_slurm_job_once_its_state_is_saved(
    array: dict[str, str], status: int, said_so: str, tmp_path: Path
) -> None:
    """With a scontrol that writes down what it is asked, and what checkpoints there are then."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/scontrol"
    saved = tmp_path / "run/checkpoints"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\nls "{saved}" >> "{tmp_path}/asked"\n'
        f"echo no such job >&2\nexit {status}\n"
    )
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77", **array}
    victim = Victim(
        tmp_path / "run",
        target=signalled,
        resume=False,
        place="forward",
        numbers=[signal.SIGUSR1],
        environment=environment,
    )
    assert victim.end() == 128 + signal.SIGUSR1
    assert said_so in said(tmp_path / "run")
    job = "70_4" if array else "77"
    assert (tmp_path / "asked").read_text().split() == ["requeue", job, "step-00000002"]


def test_other_signals_requeue_nothing(tmp_path: Path) -> None:
    environment = {"PATH": "/nowhere", "SLURM_JOB_ID": "77"}
    victim = Victim(
        tmp_path,
        target=signalled,
        resume=False,
        place="forward",
        numbers=[signal.SIGTERM],
        environment=environment,
    )
    assert victim.end() == 128 + signal.SIGTERM
    assert "requeue" not in said(tmp_path)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from unittest.mock import patch
from tests.faults.victim import Restless, run
from featdistill.core.errors import Interrupted

folder, rank, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"
real, times = Restless.forward, 0

def forward(self, batch):
    global times
    times += 1
    if times == 5 and os.environ.get("LOCAL_RANK", "0") == rank:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self, batch)

status = 0
with patch.object(Restless, "forward", forward):
    try:
        run(folder, resume=resume, devices=2)
    except Interrupted as stopped:
        status = stopped.exit_code
(folder / f"status-{os.environ.get('LOCAL_RANK', '0')}").write_text(str(status))
sys.exit(status)
"""


@pytest.mark.faults
@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_of_two_is_told_and_both_stop_after_the_same_step(
    rank: str, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def train(folder: Path, told: str, how: str) -> int:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, str(script), str(folder), told, how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, 143), done.stderr
        return done.returncode

    broken, whole = tmp_path / "broken", tmp_path / "whole"
    assert train(broken, rank, "anew") == 128 + signal.SIGTERM
    assert (broken / "status-0").read_text() == (broken / "status-1").read_text() == "143"
    assert newest(broken).step in (5, 6)  # votes are counted a step later
    assert train(broken, "nobody", "resume") == 0
    assert train(whole, "nobody", "anew") == 0
    ended, want = digest(broken), digest(whole)
    for name in ("model", "optimizer", "average", "random"):
        assert ended[name] == want[name], name
    steps = [step for step, _, _ in rows_of(broken)]
    assert sorted(steps) == sorted(2 * list(range(STEPS))), "each process took each step once"
