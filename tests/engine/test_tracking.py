"""metrics.jsonl across stops and resumes; times as a person reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from featdistill.engine.rundir import read_metrics
from featdistill.engine.tracking import Bar, MetricsLog, duration


def write(folder: Path, steps: range, *, resume_at: int = 0) -> None:
    log = MetricsLog(folder, resume_at=resume_at, tensorboard=False)
    for step in steps:
        log.write(step, {"loss": step / 2})
    log.close()


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


def test_lines_are_there_before_the_end(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(1, {"loss": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    log.close()


def test_a_resumed_run_writes_later_steps_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 10))
    write(tmp_path, range(7, 12), resume_at=6)
    assert steps(tmp_path) == list(range(1, 12))


def test_a_run_begun_again_begins_its_log_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 10))
    write(tmp_path, range(1, 3))
    assert steps(tmp_path) == [1, 2]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    write(tmp_path, range(4, 6), resume_at=3)
    assert steps(tmp_path) == [1, 2, 4, 5]


def test_tensorboard_events(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=True)
    log.write(1, {"loss": 0.5})
    log.close()
    (file,) = tmp_path.glob("events.*")
    assert b"loss" in file.read_bytes()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (3.2, "3 s"),
        (59, "59 s"),
        (60, "1:00 min"),
        (245, "4:05 min"),
        (3599, "59:59 min"),
        (3600, "1:00 h"),
        (9000, "2:30 h"),
        (47.9 * 3600, "47:54 h"),
        (48 * 3600, "2.0 days"),
        (3.2 * 86400, "3.2 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_quiet_bar_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("training", quiet=True)
    bar.start(10, 0)
    bar.update(3, "loss 1")
    bar.stop()
    assert capsys.readouterr() == ("", "")
