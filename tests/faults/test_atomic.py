"""A kill before or after any write, rename or sync leaves a checkpoint to go on from."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from featdistill.core import records
from featdistill.engine import checkpoint
from featdistill.engine.checkpoint import Checkpoints
from featdistill.engine.writer import Writer
from tests.faults.harness import (
    CONTEXT,
    PATIENCE,
    Victim,
    consumed,
    digest,
    finish,
    said,
)
from tests.faults.victim import run, session

# every call by which a run changes what is on the disk, other than through an open file
CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


def count_calls(folder: Path, options: dict[str, Any]) -> None:
    """A session that writes down how many calls it made, or is killed around the k-th.

    With `ahead`, a kill in a write comes only when the loop is as far as it gets meanwhile.
    """
    kill_at, after = options.pop("kill_at", None), options.pop("after", False)
    if options.pop("ahead", False):
        catch_up = loop_ahead(folder)
    else:

        def catch_up() -> None:
            pass

    made = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal made
            made += 1
            mine = made
            if mine == kill_at and not after:
                catch_up()
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*arguments, **more)
            finally:  # some are tried in vain, a folder that is there already is made again
                if mine == kill_at and after:
                    catch_up()
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    # shutil took these when it was imported, and safetensors writes by itself
    checkpoint.save_file = counted(checkpoint.save_file)  # type: ignore[attr-defined]
    session(folder, options)
    (folder / "calls").write_text(str(made))


def loop_ahead(folder: Path) -> Callable[[], None]:
    """What waits, in a write's thread, until the loop stands at the next step to be saved."""
    step, real = 0, Writer.room_for

    def room_for(self: Writer, number: int) -> None:
        nonlocal step
        real(self, number)
        step = number

    def catch_up() -> None:
        if threading.current_thread() is threading.main_thread():
            return
        until = time.monotonic() + PATIENCE
        while consumed(folder) < (step // 3 + 1) * 3:
            assert time.monotonic() < until, "the loop waits for the write"
            time.sleep(0.0005)

    Writer.room_for = room_for  # type: ignore[method-assign]
    return catch_up


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 6 with checkpoints of 3 and 6: the next save also deletes."""
    folder = tmp_path_factory.mktemp("stopped")
    finish(folder, resume=False, stop_at=6)
    return folder


@pytest.fixture(scope="module")
def calls(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many calls there are from step 6 to step 9: an evaluation, a best state, a checkpoint."""
    folder = tmp_path_factory.mktemp("counted") / "run"
    shutil.copytree(stopped, folder)
    assert Victim(folder, target=count_calls, resume=True, stop_at=9).end() == 0
    return int((folder / "calls").read_text())


def survives(folder: Path) -> None:
    """There is a whole checkpoint at every moment."""
    found = Checkpoints(folder / "checkpoints").latest()
    assert found is not None
    assert found.step in (6, 9)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("after", "ahead"),
    [(False, False), (True, False), (False, True)],
    ids=["before", "after", "with the loop ahead"],
)
def test_a_kill_around_every_call(
    after: bool, ahead: bool, stopped: Path, calls: int, undisturbed: Path, tmp_path: Path
) -> None:
    """While the loop stands wherever it is, and where it has gone on as far as it may."""
    assert calls > 25, "a save alone makes more"
    where: dict[str, Any] = {"ahead": True} if ahead else {"stop_at": 9}
    for k in range(1, calls + 1):
        folder = Path(shutil.copytree(stopped, tmp_path / str(k)))
        victim = Victim(folder, target=count_calls, resume=True, kill_at=k, after=after, **where)
        assert victim.end() == -signal.SIGKILL, f"call {k}"
        survives(folder)
        finish(folder, resume=True)
        assert digest(folder) == digest(undisturbed), f"call {k}"
        left = sorted(p.name for p in (folder / "checkpoints").iterdir())
        assert left == ["best", "step-00000027", "step-00000030"], f"call {k}"
        assert not list((folder / "checkpoints/best").glob(".*")), f"call {k}"
        assert "WARNING" not in said(folder), f"call {k}"
        shutil.rmtree(folder)


def test_a_kill_around_some_calls(
    stopped: Path, calls: int, undisturbed: Path, tmp_path: Path
) -> None:
    for k in (2, calls // 2, calls - 1):
        folder = Path(shutil.copytree(stopped, tmp_path / str(k)))
        options: dict[str, Any] = {"resume": True, "ahead": True, "kill_at": k}
        assert Victim(folder, target=count_calls, **options).end() == -signal.SIGKILL
        survives(folder)
        finish(folder, resume=True)
        assert digest(folder) == digest(undisturbed), f"call {k}"


def cut_writes(folder: Path, options: dict[str, Any]) -> None:
    """A session that the kernel kills at the byte where a file would grow past a limit."""
    limit = options.pop("limit")
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    session(folder, options)


@pytest.mark.parametrize(
    "share",
    [
        pytest.param(share, marks=() if share == 0.5 else pytest.mark.faults)
        for share in (0.01, 0.2, 0.5, 0.8, 0.999)
    ],
)
def test_a_kill_in_the_midst_of_a_write(
    share: float, stopped: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The kernel lets a part of the largest file be written, and no more."""
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    saved = folder / "checkpoints/step-00000006"
    largest = max(file.stat().st_size for file in saved.iterdir())
    limit = max(int(share * largest), (folder / "metrics.jsonl").stat().st_size + 400)
    victim = Victim(folder, target=cut_writes, resume=True, limit=limit)
    assert victim.end() == -signal.SIGXFSZ
    survives(folder)
    finish(folder, resume=True)
    assert digest(folder) == digest(undisturbed)


def replace_and_die(folder: Path, options: dict[str, Any]) -> None:
    """Save a step that is there already, and be killed after some renames."""
    left = options["renames"]
    real = os.rename

    def rename(*arguments: Any) -> None:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        real(*arguments)

    with patch.object(os, "rename", rename):
        Checkpoints(folder).save(1, {"model": {"w": torch.ones(3)}}, {"new": True})


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_a_step_is_saved_again(renames: int, tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, {"model": {"w": torch.ones(3)}}, {"new": False})
    process = CONTEXT.Process(target=replace_and_die, args=(tmp_path, {"renames": renames}))
    process.start()
    process.join()
    assert process.exitcode == (0 if renames == 2 else -signal.SIGKILL)
    found = store.recover()
    assert found is not None
    assert found.manifest["new"] is (renames == 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_disk_that_keeps_other_bytes_is_found_out_before_anything_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, {"model": {"w": torch.ones(3)}}, {})
    real = checkpoint.sync

    def forgetful(path: Path) -> None:
        if path.suffix == ".safetensors":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        real(path)

    monkeypatch.setattr(checkpoint, "sync", forgetful)
    with pytest.raises(records.RunError, match="reads back otherwise"):
        store.save(2, {"model": {"w": torch.ones(3)}}, {})
    assert store.steps() == [1]
    assert store.latest() is not None


def test_a_checkpoint_has_its_name_only_once_all_of_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, folder and metrics are synced, then comes the rename, then what is old goes."""
    events: list[tuple[str, str]] = []
    begun = 0  # events before this checkpoint's
    fsync, rename = os.fsync, os.rename

    def synced(handle: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        nonlocal begun
        rename(old, new)
        events.append(("rename", str(new)))
        if Path(new).name.startswith("step-"):
            due = [file.name for file in Path(new).iterdir()]
            before = [Path(p) for kind, p in events[begun:] if kind == "sync"]
            # (the manifest is synced under the name that it is written by)
            there = {p.name for p in before if p.parent == Path(old)}
            assert all(any(name in seen for seen in there) for name in due), due
            assert Path(old) in before
            if Path(new).parent.name == "checkpoints":
                assert tmp_path / "metrics.jsonl" in before
                begun = len(events)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    run(tmp_path, resume=False, stop_at=12)
    ours = [(kind, Path(p)) for kind, p in events if Path(p).parent.name == "checkpoints"]
    names = [p.name for kind, p in ours if kind == "rename"]
    assert names == [
        *("step-00000003", "step-00000006", "step-00000009", ".deleted-step-00000003"),
        *("step-00000012", ".deleted-step-00000006"),
    ]
    for old, new in ((3, 9), (6, 12)):
        deleted = events.index(("rename", str(tmp_path / f"checkpoints/.deleted-step-{old:08d}")))
        came = events.index(("rename", str(tmp_path / f"checkpoints/step-{new:08d}")))
        assert ("sync", str(tmp_path / "checkpoints")) in events[came:deleted]
