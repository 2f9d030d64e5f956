"""The journal: what `add` returned for is there after any kill; a half line is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featdistill.core.errors import RunError
from featdistill.engine.journal import Journal, read_journal

VALUES = [[1, [0.1, float("inf")]], {"name": "ä\u2028 line"}, -0.0]


def written(file: Path) -> bytes:
    with Journal(file) as journal:
        for value in VALUES:
            journal.add(value)
    return file.read_bytes()


def test_values_come_back(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "journal"
    assert read_journal(file) == []
    written(file)
    assert read_journal(file) == VALUES
    written(file)
    assert read_journal(file) == VALUES + VALUES


@given(cut=st.integers(0, 200))
def test_cut_anywhere_the_whole_lines_are_there(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("journal") / "journal"
    data = written(file)
    file.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    assert read_journal(file) == VALUES[:whole]
    with Journal(file) as journal:  # and goes on behind them
        journal.add("more")
    assert read_journal(file) == [*VALUES[:whole], "more"]


def test_a_damaged_line_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    data = bytearray(written(file))
    data[12] ^= 1
    file.write_bytes(data)
    assert read_journal(file) == VALUES[1:]


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from featdistill.engine.journal import Journal\n"
        "with Journal(Path(sys.argv[1])) as journal:\n"
        "    for i in range(5): journal.add(i)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], env=os.environ, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert read_journal(file) == list(range(5))


def test_a_folder_in_its_place_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"), Journal(tmp_path):
        pass
