"""Loading processes that are killed or hang: an error that names them, and no orphan is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from featdistill.config.commands import ModelsConfig
from featdistill.core.errors import DataError
from featdistill.data import workers
from featdistill.data.loader import listed_batches, plainly, training_batches
from featdistill.data.sources import ArraySource
from featdistill.data.views import EvalView
from featdistill.tasks import run_command

BAD = 5


@dataclass(frozen=True)
class Killed(ArraySource):
    """The process that reads image 5 is killed, as by the kernel where memory is short."""

    def read(self, index: int) -> Tensor:
        if index == BAD:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


@dataclass(frozen=True)
class Hanging(ArraySource):
    """Reading image 5 never ends: its disk is gone."""

    def read(self, index: int) -> Tensor:
        if index == BAD:
            signal.pause()
        return super().read(index)


def images(kind: type[ArraySource]) -> ArraySource:
    return kind("photos", torch.zeros(12, 3, 8, 8, dtype=torch.uint8))


def complaint(source: ArraySource, *, training: bool) -> str:
    view = EvalView(8)
    loader = (
        training_batches(source, view, batch_size=4, seed=0, start=0, stop=6, workers=2)
        if training
        else listed_batches(source, view, batches=[[0, 1], [4, BAD], [2, 3]], workers=2)
    )
    with pytest.raises(DataError) as caught:
        list(plainly(loader))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("training", [True, False])
def test_a_killed_process_is_named_with_its_image(training: bool) -> None:
    message = complaint(images(Killed), training=training)
    assert message.startswith("a loading process (pid ")
    assert "of 'photos' died (killed by signal: Killed)" in message
    assert "photos[5]" in message
    assert "fewer --workers" in message


def test_a_hanging_process_is_named_with_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_PATIENCE", 2)
    message = complaint(images(Hanging), training=False)
    assert message.startswith("no batch of 'photos' came for 2 seconds: its loading processes hang")
    assert "while reading 'photos[5]'" in message


def test_a_death_in_the_middle_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's handler raises wherever the main thread is."""

    class Task:
        @staticmethod
        def run(_: object) -> None:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr("featdistill.tasks.import_module", lambda _: Task)
    with pytest.raises(DataError, match=r"a loading process \(pid 7\) of the images died"):
        run_command("models", ModelsConfig())


def test_other_errors_of_a_loader_are_not_swallowed() -> None:
    class Broken(ArraySource):
        def read(self, index: int) -> Tensor:
            raise RuntimeError("a defect")

    loader = listed_batches(images(Broken), EvalView(8), batches=[[0]], workers=0)
    with pytest.raises(RuntimeError, match="a defect"):
        list(plainly(loader))


PARENT = """
import sys, torch
from featdistill.data.loader import listed_batches
from featdistill.data.views import EvalView
from tests.faults.test_workers import Hanging, images
loader = listed_batches(images(Hanging), EvalView(8), batches=[[0], [5]] + [[2]] * 20, workers=2)
batches = iter(loader)
next(batches)
print(*(w.pid for w in batches._workers), flush=True)
next(batches)
"""


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# the same within the training loop, whose loading processes are shielded from signals too
TRAINING = """
import sys
from pathlib import Path
from tests.faults import calm
from featdistill.engine import loop
plainly = loop.plainly
def shown(loader):
    began = loader._get_iterator()
    print(*(w.pid for w in began._workers), flush=True)
    loader._get_iterator = lambda: began
    return plainly(loader)
loop.plainly = shown
calm.run(Path(sys.argv[1]), workers=2, endless=range(40))
"""


@pytest.mark.parametrize("program", [PARENT, TRAINING], ids=["scoring", "training"])
def test_no_orphan_is_left_when_the_parent_is_killed(program: str, tmp_path: Path) -> None:
    """Even of a process that hangs, and so never looks whether its parent is there."""
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
