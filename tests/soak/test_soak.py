"""20,000 steps, 200 evaluations and 200 checkpoints: nothing grows but the lines of the log.

Growth is from one evaluation to the next (they come together with the checkpoints), over the last
two thirds of the run: at first allocators and caches fill.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import linear_regression, median

import pytest

from featdistill.engine.checkpoint import Checkpoints
from tests.soak.session import LEAK

STEPS, EVALUATIONS = 20_000, 200
# Largest growth from one evaluation to the next. Of memory 22 KiB were measured (lab notes), whose
# cause is not known yet.
LIMITS = {
    "memory_kib": 32.0,
    "worker_kib": 16.0,
    "handles": 0.02,
    "threads": 0.02,
    "workers": 0.02,
    "files": 0.02,
    "disk_kib": 0.1,
}
LOG_LIMIT = 8.0  # KiB per 100 steps, of metrics.jsonl, TensorBoard's events and log.txt together
_JUMPY = ("memory_kib", "worker_kib")  # allocators take much at once, now and then


def growth(values: Sequence[float], *, jumpy: bool) -> float:
    """Slope a sample: of least squares, or the median over pairs, which a jump hardly moves."""
    if not jumpy:
        return linear_regression(range(len(values)), values).slope
    return median((values[j] - values[i]) / (j - i) for i, j in combinations(range(len(values)), 2))


def growths(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of everything that is measured, after the first third."""
    settled = samples[len(samples) // 3 :]
    return {
        name: growth([s[name] for s in settled], jumpy=name in _JUMPY)
        for name in (*LIMITS, "log_kib")
    }


def too_much(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What grows by more than its limit."""
    found = growths(samples)
    return {name: found[name] for name, limit in LIMITS.items() if found[name] > limit}


def session(folder: Path, steps: int, *more: str) -> list[dict[str, float]]:
    every = steps // EVALUATIONS
    words = [sys.executable, "-m", "tests.soak.session", str(folder), str(steps), str(every), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (folder / "samples.jsonl").read_text().splitlines()
    samples: list[dict[str, float]] = [json.loads(line) for line in lines]
    assert [s["step"] for s in samples] == list(range(every, steps + 1, every))
    return samples


@pytest.mark.soak
def test_nothing_grows(tmp_path: Path) -> None:
    samples = session(tmp_path, STEPS)
    found = growths(samples)
    print(json.dumps({"growth": found, "first": samples[0], "last": samples[-1]}, indent=1))
    assert too_much(samples) == {}
    assert found["log_kib"] < LOG_LIMIT * STEPS / EVALUATIONS / 100
    assert samples[-1]["workers"] == 2, "what loading processes use is counted"
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == [STEPS - 100, STEPS]


SHORT = 2000


@pytest.mark.soak
def test_a_shorter_run_neither(tmp_path: Path) -> None:
    """What the control is compared with."""
    assert too_much(session(tmp_path, SHORT)) == {}


@pytest.mark.soak
def test_a_little_leak_of_each_kind_is_caught(tmp_path: Path) -> None:
    samples = session(tmp_path, SHORT, "leaking")
    found = growths(samples)
    print(json.dumps(found, indent=1))
    assert too_much(samples).keys() == LEAK.keys()
    for name, leak in LEAK.items():
        # (the threads that stay have stacks)
        assert 0.5 * leak < found[name] < 3 * leak, "it is measured, too"


# the arithmetic, in every test run


def flat(count: int = 60) -> list[dict[str, float]]:
    """Samples that grow at first, and jitter."""
    base = dict.fromkeys((*LIMITS, "log_kib"), 100.0)
    memory = [500_000 + 40 * min(i, 15) + 12 * (i * 7 % 5) for i in range(count)]
    return [{**base, "memory_kib": m, "worker_kib": 2 * m} for m in memory]


def test_a_flat_run_passes_and_a_jump_of_the_allocator_too() -> None:
    samples = flat()
    assert too_much(samples) == {}
    jumped = [{**s, "memory_kib": s["memory_kib"] + 2048 * (i > 55)} for i, s in enumerate(samples)]
    assert too_much(jumped) == {}


@pytest.mark.parametrize("name", LIMITS)
def test_what_grows_by_twice_its_limit_is_found(name: str) -> None:
    leak = 2 * LIMITS[name]
    samples = [{**s, name: s[name] + leak * i} for i, s in enumerate(flat())]
    assert list(too_much(samples)) == [name]


@pytest.mark.parametrize("name", ["handles", "threads", "workers", "files"])
def test_a_single_one_that_stays_is_found(name: str) -> None:
    samples = [{**s, name: s[name] + (i > 40)} for i, s in enumerate(flat())]
    assert list(too_much(samples)) == [name]
