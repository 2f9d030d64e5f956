"""20,000 mutated image files through the sample reader: no crash, no hang, memory bounded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.faults import fuzz_images


def fuzz(first: int, last: int) -> dict[str, int]:
    """Read files `first` .. `last` in a process of its own; how often each outcome came."""
    command = [sys.executable, "-m", fuzz_images.__name__, str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    lines = done.stdout.splitlines() or ["nothing"]
    assert done.returncode == 0, f"file {lines[-1]}: {done.returncode}\n{done.stderr[-2000:]}"
    found = json.loads(lines[-1])
    assert lines[:-1] == [str(n) for n in range(first, last)]
    assert found["kilobytes"] < 2 << 20, found
    assert found["kinds"] > 40
    return found["seen"]


def test_a_few_hundred_mutated_files() -> None:
    seen = fuzz(0, 400)
    assert seen["image"] + seen["bad image"] == 400
    assert min(seen["image"], seen["bad image"], seen["BadImage"], seen["DataError"]) > 20


@pytest.mark.faults
def test_twenty_thousand_mutated_files() -> None:
    seen = fuzz(400, 20_400)
    assert seen["image"] + seen["bad image"] == 20_000


def test_the_watchdog_and_the_limit_are_there() -> None:
    """Negative control: a file that hangs the reader, and one that eats memory, end the process."""
    for body, seconds, code in (("while True: pass", 1, -14), ("bytearray(8 << 30)", 60, 1)):
        program = (
            "from tests.faults import fuzz_images as f\n"
            f"f.SECONDS = {seconds}\n"
            f"def read(folder, data):\n    {body}\n    return []\n"
            "f.read = read\n"
            "f.main(0, 1)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
        assert done.returncode == code, done.stderr
