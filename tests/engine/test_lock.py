"""Two launches on one folder: the second refuses, and what a killed one left is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from featdistill.core.errors import RunError
from featdistill.engine import lock
from featdistill.engine.lock import LOCK, check_free, claim, released
from featdistill.engine.rundir import check_out

HOLD = """
import sys, multiprocessing
from pathlib import Path
from featdistill.core.errors import RunError
from featdistill.engine.lock import claim
sys.stdin.readline()
try:
    claim(Path(sys.argv[1]))
    print("mine", flush=True)
except RunError as error:
    print(error, flush=True)
sys.stdin.read()
"""


class Launch:
    """Another process that claims a folder when told to."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", HOLD, str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def elsewhere(folder: Path) -> Iterator[Launch]:
    """A folder that another process has."""
    launch = Launch(folder)
    try:
        launch.go()
        assert launch.says() == "mine"
        yield launch
    finally:
        launch.kill()


def test_the_second_launch_refuses_and_names_the_first(tmp_path: Path) -> None:
    with elsewhere(tmp_path) as other:
        for attempt in (claim, check_free, lambda folder: check_out(str(folder), resume=True)):
            with pytest.raises(RunError) as caught:
                attempt(tmp_path)
            message = str(caught.value)
            assert f"is in use by process {other.process.pid} on " in message
            assert "wait for it or stop it" in message


def test_what_a_killed_launch_left_is_taken_over(tmp_path: Path) -> None:
    with elsewhere(tmp_path) as other:
        other.kill()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == other.process.pid
        check_free(tmp_path)
        with released():
            note = claim(tmp_path)
            assert note is not None
            assert f"over from process {other.process.pid} on" in note
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_of_many_launches_at_once_one_wins(tmp_path: Path) -> None:
    launches = [Launch(tmp_path) for _ in range(4)]
    try:
        for launch in launches:
            launch.go()
        said = [launch.says() for launch in launches]
        assert said.count("mine") == 1
        assert sum("is in use by" in line for line in said) == 3
    finally:
        for launch in launches:
            launch.kill()


def test_a_lock_ends_with_its_block_and_says_nothing_afterwards(tmp_path: Path) -> None:
    with released():
        assert claim(tmp_path) is None
        assert claim(tmp_path) is None, "twice in one process is once"
        check_free(tmp_path)
        with released():
            claim(tmp_path)
        second = Launch(tmp_path)
        second.go()
        assert f"process {os.getpid()} on" in second.says(), "an inner block gives up its own alone"
        second.kill()
    assert (tmp_path / LOCK).read_bytes() == b""
    with elsewhere(tmp_path):
        pass


def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path\n"
        "from featdistill.engine.lock import claim\n"
        "claim(Path(sys.argv[1])); child = os.fork()\n"
        "if not child: os.close(1); signal.pause()\n"
        "print(child, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    child = int(done.stdout)
    try:
        os.kill(child, 0)
        check_free(tmp_path)
    finally:
        os.kill(child, 9)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"pid": "x"}', b"[" * 5000])
def test_a_lock_file_that_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with released():
        assert claim(tmp_path) is None
    with elsewhere(tmp_path):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(RunError, match="in use by another process"):
            claim(tmp_path)


def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", fail)
    note = claim(tmp_path)
    assert note is not None
    assert "cannot be locked (No locks available)" in note


def test_a_run_s_other_processes_do_not_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with elsewhere(tmp_path):
        monkeypatch.setenv("LOCAL_RANK", "1")
        check_free(tmp_path)
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(RunError):
            check_free(tmp_path)


def test_a_folder_with_a_lock_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    check_out(str(tmp_path), resume=False)
