"""What goes wrong in one process of several is said once, and ends all of them soon."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from featdistill.core.errors import ConfigError, DataError, Interrupted
from featdistill.engine.runtime import Runtime
from featdistill.engine.vote import Vote
from tests.faults.calm import IMAGES
from tests.faults.harness import newest
from tests.faults.team import order, said, together

FULL = pytest.mark.faults
SOON = 60  # seconds; the communication library would wait for half an hour


def fails(folder: Path, kind: str, who: int, world: int = 2, **options: Any) -> list[int]:
    began = time.monotonic()
    fault = ("failing", {"kind": kind, "step": 3, "ranks": [who]})
    statuses = together(folder, world, fault=fault, checkpoint_every=2, **options)
    assert time.monotonic() - began < SOON
    return statuses


@pytest.mark.parametrize(("who", "world"), [(0, 2), (1, 2), pytest.param(2, 3, marks=FULL)])
def test_a_mistake_of_one_is_said_once_and_ends_all(who: int, world: int, tmp_path: Path) -> None:
    assert fails(tmp_path, "data", who, world, batch_size=6) == [2] * world
    lines = said(tmp_path).splitlines()
    assert [x for x in lines if not x.startswith("[")] == [
        f"error: process {who} has no images; look for them"
    ]
    assert newest(tmp_path).step == 2


@pytest.mark.parametrize("who", [pytest.param(0, marks=FULL), 1])
def test_a_defect_shows_its_traceback_where_it_is(who: int, tmp_path: Path) -> None:
    assert fails(tmp_path, "defect", who) == [1, 1]
    assert said(tmp_path).count("Traceback: ZeroDivisionError('a defect')") == 1
    assert "error: " not in said(tmp_path)


@pytest.mark.parametrize("who", [pytest.param(0, marks=FULL), 1])
def test_a_process_that_is_killed(who: int, tmp_path: Path) -> None:
    statuses = fails(tmp_path, "killed", who)
    assert statuses[who] == -signal.SIGKILL
    assert statuses[1 - who] == 2
    assert "error: another process of this run ended without a word; see" in said(tmp_path)
    assert together(tmp_path, 2, resume=True) == [0, 0]


def test_an_error_within_the_loading_processes_of_one(tmp_path: Path) -> None:
    """Twenty images in a row that cannot be read are an error in the loader, of that process."""
    spoilt = tuple(range(1, IMAGES))
    assert together(tmp_path, 2, spoilt=spoilt, workers=1, bad_image_limit=1.0) == [2, 2]
    assert said(tmp_path).count("error: 20 images in a row could not be read, the last: ") == 1


def test_the_limit_of_unreadable_images_is_of_all_processes(tmp_path: Path) -> None:
    """Of five spoilt images no process sees more than three in the first epoch."""
    spoilt, limit = (3, 4, 5, 6, 7), 0.1
    assert together(tmp_path, 2, spoilt=spoilt, bad_image_limit=limit) == [2, 2]
    text = said(tmp_path)
    assert text.count("error: 5 of 40 images cannot be read") == 1, text
    seen = [
        {i for row in rows for i in row} & set(spoilt)
        for rows in ([r[:4] for r in order(tmp_path)], [r[4:] for r in order(tmp_path)])
    ]
    assert all(0 < len(mine) <= limit * IMAGES for mine in seen), (
        "no process passed the limit alone"
    )
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 5
    assert together(tmp_path / "more", 2, spoilt=spoilt, bad_image_limit=0.125) == [0, 0]
    assert len((tmp_path / "more/quarantine.jsonl").read_text().splitlines()) == 5


def talk(folder: Path, *, devices: int) -> None:
    """What processes say to each other, checked in each of them."""
    runtime = Runtime(device="cpu", devices=devices)
    me, world = runtime.share.rank, runtime.share.world
    for kind in (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.int64,
        torch.int16,
        torch.bool,
    ):
        for tail in ((), (3,)):
            parts = [torch.arange(6 * r).to(kind).reshape(-1, *tail) for r in range(world)]
            found = runtime.gather(parts[me])
            assert found.dtype == kind
            assert torch.equal(found, torch.cat(parts)), (kind, tail)
    odd = torch.tensor([float("nan"), -0.0, float("inf")])
    assert runtime.gather(odd).view(torch.int32).tolist() == odd.view(torch.int32).tolist() * world
    vote = Vote(runtime, 2)
    assert vote.cast(me, 0) == (0, 0), "nothing was counted yet"
    assert vote.cast(0, 7 - me) == (world - 1, 0)
    assert vote.close() == (0, 7)
    assert vote.close() == (0, 0)
    for error in (DataError("a", expected="b", fix="c"), ConfigError(["x", "y"])):
        with pytest.raises(type(error)) as caught:
            runtime.together(error if me == 1 else None)
        assert vars(caught.value) == vars(error)
        assert str(caught.value) == str(error)
    runtime.together(None)
    raise Interrupted("the end", signal_number=15)


def test_what_processes_say_to_each_other(tmp_path: Path) -> None:
    assert together(tmp_path, 3, work=talk) == [143] * 3, said(tmp_path)
    assert said(tmp_path).count("the end") == 1


SCRIPT = """
import sys
from unittest.mock import patch
from featdistill.cli.main import main
from featdistill.core.errors import DataError
from featdistill.data.loader import Samples

real = Samples.__getitem__

def read(self, item):
    import os
    if os.environ.get("LOCAL_RANK") == "{who}" and item.position % 8 == 3 and self.seed == 0:
        raise DataError("the disk of these images is gone", fix="mount it")
    return real(self, item)

with patch.object(Samples, "__getitem__", read):
    sys.exit(main(sys.argv[1:]))
"""


@FULL
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("preflight", ["true", "false"])
def test_at_the_command_line(who: int, preflight: str, tmp_path: Path) -> None:
    """Started as users start it: the first process starts the other."""
    from tests.faults.test_world_size import WORDS

    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(who=who))
    more = ["--run.preflight", preflight, "--run.devices", "2", "--out", str(tmp_path / "run")]
    words = [sys.executable, str(script), *WORDS, *more]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error: the disk of these images is gone; mount it"]
    assert "Traceback" not in done.stderr
