"""Two launches of a command on one folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from featdistill.cli.main import main
from featdistill.engine.lock import LOCK
from tests.engine.test_lock import elsewhere

WORDS = ["distill", "--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", "random"]
WORDS += ["--student", "vit-t", "--student.depth", "1", "--data", "digits", "--image-size", "32"]
WORDS += ["--batch-size", "4", "--workers", "0", "--steps", "2", "--run.preflight", "false"]


def test_the_second_launch_is_refused_until_the_first_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    begin = [*WORDS, "--out", str(out)]
    assert main([*begin, "--schedule.stop_at", "1"]) == 0
    assert (out / LOCK).read_bytes() == b"", "given up at the end"
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != LOCK}
    capsys.readouterr()
    with elsewhere(out) as other:
        for words in (begin, [*begin, "--resume"]):
            assert main(words) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: output folder '{out}' is in use by process ")
            assert f" {other.process.pid} on " in line
        assert {p: p.read_bytes() for p in before} == before
        other.kill()
        assert main([*begin, "--resume"]) == 0
    assert f"over from process {other.process.pid}" in capsys.readouterr().err
