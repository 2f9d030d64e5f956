"""Another number of processes on a resume: the same order of samples, losses alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from featdistill.cli.main import main
from featdistill.core.errors import DataError
from featdistill.engine.rundir import read_metrics
from featdistill.engine.schedule import Schedule
from tests.faults.calm import STEPS, run
from tests.faults.harness import newest
from tests.faults.team import order, said, together

TOLERANCE = 1e-4  # relative, on losses and norms; sums in another order differ by less than 1e-5
NAMES = ("loss", "size", "grad_norm")


def values(folder: Path) -> list[float]:
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, STEPS]
    return [row[name] for row in rows for name in NAMES]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, logged every third step, so that lines are of several sessions."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, log_every=3)
    return folder


def test_one_two_four_and_one_process(alone: Path, tmp_path: Path) -> None:
    for session, world in enumerate((1, 2, 4, 1)):
        done = together(tmp_path, world, resume=session > 0, log_every=3, stop_at=2 * (session + 1))
        assert done == [0] * world, said(tmp_path)
    assert order(tmp_path) == order(alone)
    assert values(tmp_path) == pytest.approx(values(alone), rel=TOLERANCE)
    one, many = newest(alone).files, newest(tmp_path).files
    assert one.keys() == many.keys()
    for kind in ("model", "optimizer", "average"):
        for name, value in one[kind].items():
            if name != "seen":
                assert many[kind][name].allclose(value, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("change", ["rate", "order"])
def test_the_tolerance_would_notice(change: str, alone: Path, tmp_path: Path) -> None:
    """The controls: a learning rate one percent off, and another order of the same samples."""
    if change == "rate":
        run(tmp_path, log_every=3, schedule=Schedule(STEPS, 2, 0.0505, 0.001, 0.0001))
        assert order(tmp_path) == order(alone)
    else:
        run(tmp_path, log_every=3, seed=4)
        assert order(tmp_path) != order(alone)
    assert values(tmp_path) != pytest.approx(values(alone), rel=TOLERANCE)


def test_a_batch_that_the_processes_cannot_share(tmp_path: Path) -> None:
    run(tmp_path, stop_at=2)
    assert together(tmp_path, 3, resume=True) == [2, 2, 2]
    text = said(tmp_path)
    assert text.count("error: ") == 1, text
    line = (
        "error: a batch of 8 is not divisible by 3 processes x 1 micro-batches; give --batch-size 6"
    )
    assert line in text
    with pytest.raises(DataError, match="not divisible"):
        run(tmp_path, resume=True, micro_batches=3)


WORDS = [
    *("distill", "--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", "random"),
    *("--teacher-image-size", "32", "--student", "vit-t", "--student.width", "64"),
    *("--student.depth", "1", "--student-patch", "8", "--image-size", "16", "--data", "digits"),
    *("--batch-size", "16", "--lr", "1e-3", "--workers", "0", "--device", "cpu"),
    *("--steps", "4", "--holdout", "none", "--run.preflight", "false"),
    *("--run.log_every", "1", "--run.tensorboard", "false"),
]


def test_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main([*WORDS, *out, "--schedule.stop_at", "2"]) == 0
    capsys.readouterr()
    assert main([*WORDS, *out, "--resume", "--run.devices", "3"]) == 2
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert "a batch of 16 is not divisible by 3 processes" in line
    assert main([*WORDS, *out, "--resume", "--run.micro_batches", "2"]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert (
        "WARNING: this session cuts a batch otherwise than the first (run.micro_batches: 1 -> 2)"
        in text
    )
    assert main([*WORDS, "--out", str(tmp_path / "whole")]) == 0
    halves, whole = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("run", "whole"))
    losses = [[row["loss"] for row in rows] for rows in (halves, whole)]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
