"""kill -9 at any instant: the run that goes on ends as the run that nobody killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from featdistill.data.device_cache import to_device
from featdistill.engine.checkpoint import Checkpoints
from tests.data.test_batched_views import EXACT
from tests.faults.harness import Victim, consumed, digest, effective, finish, rows_of
from tests.faults.victim import FORGET, STEPS, source

QUICK = 2
SHOWS = {"average": {"average"}, "meter": {"logged"}}  # where the loss of this part alone is seen
INSTANTS = [
    pytest.param(n, marks=() if n < QUICK else pytest.mark.faults, id=f"instant{n}")
    for n in range(20)
]


def kill_at(folder: Path, rng: random.Random, *, resume: bool, **options: Any) -> bool:
    """One session, killed some steps on, anywhere within a step, a save or an evaluation."""
    begun = consumed(folder)
    after, more = begun + rng.randrange(1, 12), rng.uniform(0, 0.02)
    victim = Victim(folder, resume=resume, **options)

    def ready() -> bool:
        if consumed(folder) < after:
            return False
        time.sleep(more)
        return True

    killed = victim.kill_when(ready)
    assert victim.end() == (-signal.SIGKILL if killed else 0)
    return killed


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("instant", INSTANTS)
def test_a_killed_run_ends_as_if_it_had_not_been(
    instant: int, workers: int, undisturbed: Path, tmp_path: Path
) -> None:
    rng = random.Random(f"{instant} {workers}")
    folder = tmp_path / "run"
    killed = kill_at(folder, rng, workers=workers, resume=False)
    assert killed, "it ended before it could be killed"
    if instant % 3 == 0:  # and again
        kill_at(folder, rng, workers=workers, resume=True)
    finish(folder, resume=True, workers=workers)
    assert digest(folder) == digest(undisturbed)
    assert effective(folder) == rows_of(undisturbed)
    left = [p.name for p in (folder / "checkpoints").iterdir()]
    assert sorted(left) == ["best", "step-00000027", "step-00000030"]


@pytest.mark.skipif(not EXACT, reason="torchvision resizes floats on this processor")
@pytest.mark.parametrize("instant", INSTANTS)
def test_a_killed_run_of_images_on_the_device(
    instant: int, undisturbed: Path, tmp_path: Path
) -> None:
    """It goes on to the end of the run that nobody killed and that decoded every image."""
    kept = to_device(source(), torch.device("cpu"), workers=0, progress=lambda done: None)
    rng = random.Random(f"{instant} device")
    folder = tmp_path / "run"
    assert kill_at(folder, rng, resume=False, source=kept), "it ended before it could be killed"
    finish(folder, resume=True, source=kept)
    assert digest(folder) == digest(undisturbed)
    assert effective(folder) == rows_of(undisturbed)


def test_neither_workers_nor_processes_that_were_never_killed_differ(
    undisturbed: Path, tmp_path: Path
) -> None:
    finish(tmp_path / "again", resume=False, workers=2)
    assert digest(tmp_path / "again") == digest(undisturbed)


@pytest.mark.parametrize("forget", [name for name in FORGET if name is not None])
def test_whatever_a_resume_leaves_out_is_noticed(
    forget: str, undisturbed: Path, tmp_path: Path
) -> None:
    """The controls: were any part of the state lost, the test above would fail."""
    finish(tmp_path, resume=False, stop_at=9)
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 9
    finish(tmp_path, resume=True, forget=forget)
    assert newest_step(tmp_path) == STEPS
    ended, want = digest(tmp_path), digest(undisturbed)
    differ = {name for name in want if ended[name] != want[name]}
    assert differ >= SHOWS.get(forget, {"model", "optimizer", "average", "logged"})


def newest_step(folder: Path) -> int:
    return Checkpoints(folder / "checkpoints").steps()[-1]


def test_a_stop_and_a_resume_alone_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """What the controls differ from: the same two sessions with nothing left out."""
    finish(tmp_path, resume=False, stop_at=9)
    finish(tmp_path, resume=True)
    assert digest(tmp_path) == digest(undisturbed)
