"""What a run is to do, and how it went."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from featdistill.core.types import Batch
from featdistill.data.joint_views import JointView
from featdistill.data.sources import Source
from featdistill.data.teacher_cache import TeacherCache
from featdistill.data.views import View
from featdistill.engine.best import Choice
from featdistill.engine.finite import NonFinitePolicy
from featdistill.engine.replan import Planned
from featdistill.engine.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """What a run does, apart from what it learns.

    Attributes:
        source, view: the images and how they are cut.
        batch_size: global.
        clip: largest gradient norm, or None.
        stop_at: end early, to be resumed, at this step.
        eval_every: steps between evaluations; None: a tenth of the run.
        eval_first: evaluate before the first step too.
        best: the score by which the best state is kept beside the newest; None: it is not kept.
        nonfinite: what becomes of a run with a step whose loss or gradient is no number: it stops,
            or skips up to `nonfinite_limit` of them. The weights never see such a step.
        cache: brings each batch what a teacher says of it.
        complete: from step and loaded batch to the batch to learn from; the loading processes
            cannot do it.
    """

    source: Source
    view: View | JointView
    batch_size: int
    schedule: Schedule
    seed: int
    clip: float | None = None
    micro_batches: int = 1
    workers: int | None = None
    log_every: int = 10
    checkpoint_every: int = 500
    checkpoint_keep: int = 2
    eval_every: int | None = None
    eval_first: bool = False
    best: Choice | None = None
    stop_at: int | None = None
    bad_image_limit: float = 0.01
    nonfinite: NonFinitePolicy = "stop"
    nonfinite_limit: int = 10
    tensorboard: bool = True
    title: str = "training"
    quiet: bool = False
    cache: TeacherCache | None = None
    complete: Callable[[int, Batch], Batch] | None = None

    @property
    def steps_between_evaluations(self) -> int:
        """`eval_every`, or what stands for it."""
        return self.eval_every or max(1, self.schedule.steps // 10)


@dataclass(frozen=True)
class FitResult:
    """How a run went.

    Attributes:
        step: steps done.
        finished: whether they are all.
        seconds: of all sessions, without what a kill undid.
        joules: likewise; None where the machine does not count them.
        last: the last logged values.
        schedules: by which it went, each `since` a step; more than one if it was extended.
    """

    step: int
    finished: bool
    seconds: float
    last: Mapping[str, float] = field(default_factory=dict)
    joules: float | None = None
    schedules: tuple[Planned, ...] = ()
