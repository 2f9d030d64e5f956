"""The schedules that a run had, each from a step on: a run may be extended (`--extend`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from featdistill.core.errors import RunError
from featdistill.engine.schedule import Schedule

# what a checkpoint's manifest and a record say: `since` (a step) and the schedule's fields
Planned = Mapping[str, Any]


def first_plan(schedule: Schedule) -> list[Planned]:
    """Of a run that begins."""
    return [{"since": 0, **asdict(schedule)}]


def replanned(
    before: Iterable[Planned] | None, schedule: Schedule, step: int
) -> tuple[list[Planned], str | None]:
    """The schedules of a run that goes on at a step.

    Args:
        before: as its checkpoint has them; None in one of an earlier version.
        schedule: the one to go on by.

    Returns:
        The schedules with this one, and what to say if it is another than before.

    Raises:
        RunError: the run is beyond its end.
    """
    check_reach(schedule.steps, step)
    now = {"since": step, **asdict(schedule)}
    if before is None:
        return [now], None  # what held until here is not known
    plans: list[Planned] = list(before)
    # what an earlier version's schedules had no name for was as it is
    old = {**asdict(schedule), **{k: v for k, v in plans[-1].items() if k != "since"}}
    if old == asdict(schedule):
        return plans, None
    return [*plans, now], _tell(Schedule(**old), schedule, step)


def check_reach(steps: int, reached: int) -> None:
    """Raise RunError if a schedule would end before the step that was reached."""
    if steps < reached:
        raise RunError(
            f"a schedule of {steps:,} steps, and the run has done {reached:,}",
            expected="at least as many",
            fix="give a larger --extend",
        )


def _tell(old: Schedule, new: Schedule, step: int) -> str:
    shape = "cosine" if new.power is None else "decay"
    said = (
        f"extended at step {step:,}: the schedule was {_words(old)}, and is now {_words(new)}, as "
        f"if it had been planned so from the first step (its {shape} is stretched over all of them)"
    )
    if not 0 < step < new.steps:
        return said
    was, now = old.rate(min(step, old.steps) - 1), new.rate(step)
    said += f"; the learning rate goes on from {was:.3g} at {now:.3g}"
    if now > 2 * was:
        said += ", and the loss may rise at first"
    return said


def _words(schedule: Schedule) -> str:
    return f"{schedule.steps:,} steps with {schedule.warmup:,} of warm-up, to {schedule.final:.3g}"
