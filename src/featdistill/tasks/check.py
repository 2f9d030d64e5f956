"""`featdistill check`: build everything, run one step, say what the run would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console

from featdistill.config.commands import CheckConfig
from featdistill.tasks.assembly import assemble_all, students_of
from featdistill.tasks.caches import cost_of_cache
from featdistill.tasks.describe import (
    budget_warning,
    describe,
    shapes,
    views_of,
    width_of,
    wrapped,
)
from featdistill.tasks.preflight import preflight


@dataclass(frozen=True)
class CheckResult:
    """What a distillation would cost.

    Attributes:
        seconds_per_step: the faster of two, loading left out.
        seconds_teacher: the share of it that the teacher's forward pass takes.
        seconds_per_batch_loading: time to load a batch in one process.
        seconds: of the whole run.
        memory_bytes: peak of this process (CPU) or of the device's allocator (CUDA).
        disk_bytes: of the checkpoints and the export.
        views: images that the student would see.
        loss: of a step.
        warning: what to do where the data are too few; None if they are enough.
        shapes: the rows of the shape table, for `teacher` and `student` (of several, each by its
            folder's name).
    """

    seconds_per_step: float
    seconds_teacher: float
    seconds_per_batch_loading: float
    seconds: float
    memory_bytes: int
    disk_bytes: int
    steps: int
    views: int
    loss: float
    warning: str | None
    shapes: Mapping[str, Mapping[str, str]]


def run(config: CheckConfig) -> CheckResult:
    """Check a distillation; nothing is written."""
    assembly, *others = assemble_all(students_of(config))
    console = Console(soft_wrap=True, highlight=False, quiet=not assembly.runtime.first)
    table, width = shapes(assembly, *others), width_of(console)
    for line in describe(config, assembly, table, others=others, width=width):
        console.print(line, markup=False)
    for line in wrapped("cache", cost_of_cache(config.data, assembly.data.train), width):
        console.print(line, markup=False)
    cost = preflight(config, assembly, others=others, timed=2)
    for line in ["", *cost.lines(config.data.batch_size, width)]:
        console.print(line, markup=False)
    return CheckResult(
        seconds_per_step=cost.step,
        seconds_teacher=cost.teacher,
        seconds_per_batch_loading=cost.loading,
        seconds=cost.seconds,
        memory_bytes=cost.memory,
        disk_bytes=cost.disk,
        steps=assembly.schedule.steps,
        views=views_of(config, assembly),
        loss=cost.loss,
        warning=budget_warning(config, assembly),
        shapes=table,
    )
