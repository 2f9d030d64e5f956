"""A run that is extended: openly, by the new schedule from the step that it had reached."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from featdistill.core.errors import NonFiniteError, RunError
from featdistill.engine.checkpoint import Checkpoints
from featdistill.engine.replan import first_plan, replanned
from featdistill.engine.schedule import Schedule
from tests.engine.test_loop import Line, plan, train

SHORT, LONG = (Schedule(steps, steps // 4, 0.1, 0.02, 0.001) for steps in (8, 12))


def rates(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["lr"] for row in map(json.loads, lines) if "lr" in row]


def session(
    folder: Path, schedule: Schedule, *, poison: int | None = None, **options: object
) -> Line:
    folder.mkdir(exist_ok=True)
    objective = Line(poison)
    chosen = {"schedule": schedule, "checkpoint_every": 3, **options}
    train(objective, folder, plan(**chosen), resume=(folder / "checkpoints").exists())  # type: ignore[arg-type]
    return objective


def plans(folder: Path) -> list[dict[str, object]]:
    found = Checkpoints(folder / "checkpoints").latest()
    assert found is not None
    return list(found.manifest["schedules"])


@pytest.mark.parametrize("reached", [5, 8], ids=["stopped", "finished"])
def test_rates_are_the_new_schedule_s_from_the_step_reached(reached: int, tmp_path: Path) -> None:
    session(tmp_path, SHORT, stop_at=reached)
    objective = session(tmp_path, LONG)
    expected = [SHORT.rate(step) for step in range(reached)]
    expected += [LONG.rate(step) for step in range(reached, 12)]
    assert rates(tmp_path) == expected
    assert plans(tmp_path) == [{"since": 0, **asdict(SHORT)}, {"since": reached, **asdict(LONG)}]
    assert len(objective.seen) == 12 - reached


def test_images_come_as_in_a_run_that_was_planned_so(tmp_path: Path) -> None:
    first = session(tmp_path / "extended", SHORT, stop_at=5)
    then = session(tmp_path / "extended", LONG)
    whole = session(tmp_path / "whole", LONG)
    assert first.seen + then.seen == whole.seen
    assert not torch.equal(then.line.bias, whole.line.bias), "its first rates were others"


def test_a_stop_and_a_resume_after_it_change_nothing(tmp_path: Path) -> None:
    for name, stops in (("whole", (5, None)), ("parts", (5, 7, 10, None))):
        for stop in stops:
            schedule = SHORT if stop == 5 else LONG
            ended = session(tmp_path / name, schedule, stop_at=stop)
        if name == "whole":
            want = ended.line.bias.detach().clone()
    assert torch.equal(ended.line.bias, want)
    assert plans(tmp_path / "parts") == plans(tmp_path / "whole")


def test_an_end_before_the_first_new_checkpoint_extends_once(tmp_path: Path) -> None:
    session(tmp_path, SHORT, stop_at=5)
    with pytest.raises(NonFiniteError):
        session(tmp_path, LONG, poison=5)
    assert len(plans(tmp_path)) == 1
    session(tmp_path, LONG)
    assert [found["since"] for found in plans(tmp_path)] == [0, 5]


def test_what_is_said() -> None:
    found, note = replanned(first_plan(SHORT), LONG, 8)
    assert [row["since"] for row in found] == [0, 8]
    assert note is not None
    for part in (
        "extended at step 8",
        "was 8 steps with 2 of warm-up",
        "now 12 steps with 3",
        "cosine is stretched",
        f"from {SHORT.rate(7):.3g} at {LONG.rate(8):.3g}",
        "may rise at first",
    ):
        assert part in note
    early = replanned(first_plan(SHORT), LONG, 3)[1]
    assert early is not None
    assert "may rise" not in early


def test_the_same_schedule_is_no_extension() -> None:
    assert replanned(first_plan(SHORT), SHORT, 5) == (first_plan(SHORT), None)
    # as a manifest has it, and as an earlier version might have written it
    stored = json.loads(json.dumps(first_plan(SHORT)))
    del stored[0]["power"]
    assert replanned(stored, SHORT, 5) == (stored, None)


def test_a_checkpoint_of_an_earlier_version_does_not_say_what_was_planned() -> None:
    assert replanned(None, LONG, 5) == ([{"since": 5, **asdict(LONG)}], None)


def test_nothing_that_was_done_can_be_undone(tmp_path: Path) -> None:
    session(tmp_path, LONG, stop_at=9)
    before = plans(tmp_path)
    with pytest.raises(RunError, match=r"8 steps, and the run has done 9; .*larger --extend"):
        session(tmp_path, SHORT)
    assert plans(tmp_path) == before
    session(tmp_path, Schedule(10, 2, 0.1, 0.02, 0.001))  # shorter, but not than that
    assert [found["steps"] for found in plans(tmp_path)] == [12, 10]
