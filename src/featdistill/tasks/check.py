"""`featdistill check`: build everything, run one step, say what the run would cost."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from featdistill.config.commands import CheckConfig
from featdistill.core.seeds import SampleStream
from featdistill.core.types import Batch
from featdistill.data.loader import plainly, training_batches
from featdistill.engine.optimizer import adamw, parameter_groups, set_rate
from featdistill.engine.tracking import duration
from featdistill.tasks.distill import (
    PUBLISHED_VIEWS,
    Assembly,
    assemble,
    budget_warning,
    describe,
)

_STEPS = 3  # the first warms up; the others are timed


@dataclass(frozen=True)
class CheckResult:
    """What a distillation would cost.

    Attributes:
        seconds_per_step: the fastest of the timed steps, loading left out.
        seconds_per_batch_loading: time to load a batch in this process alone.
        memory_bytes: peak of this process (CPU) or of the device's allocator (CUDA).
        views: images that the student would see.
        loss: of the first step.
        warning: what to do where the data are too few; None if they are enough.
    """

    seconds_per_step: float
    seconds_per_batch_loading: float
    memory_bytes: int
    steps: int
    views: int
    loss: float
    warning: str | None
    shapes: Mapping[str, Mapping[str, str]]


def run(config: CheckConfig) -> CheckResult:
    """Check a distillation; nothing is written."""
    assembly = assemble(config)
    console = Console(soft_wrap=True)
    for line in describe(assembly):
        console.print(line, markup=False, highlight=False)
    shapes = _shapes(assembly)
    console.print(_table(shapes))
    batches, loading = _load(config, assembly)
    step, loss = _steps(assembly, batches)
    views = assembly.schedule.steps * config.data.batch_size
    warning = budget_warning(len(assembly.data.train), views, fresh=config.student.init == "random")
    result = CheckResult(
        seconds_per_step=step,
        seconds_per_batch_loading=loading,
        memory_bytes=_memory(assembly),
        steps=assembly.schedule.steps,
        views=views,
        loss=loss,
        warning=warning,
        shapes=shapes,
    )
    _say(console, config, result)
    return result


def _shapes(assembly: Assembly) -> dict[str, dict[str, str]]:
    objective = assembly.objective
    shapes = {}
    for name, model in (("teacher", objective.teacher), ("student", objective.student)):
        mean, std = (", ".join(f"{v:.3f}" for v in values) for values in model.rgb)
        shapes[name] = {
            "image": f"{model.image_size[0]}x{model.image_size[1]}",
            "patch": str(model.patch),
            "token grid": f"{model.grid[0]}x{model.grid[1]}",
            "prefix tokens": ", ".join(model.prefix_names) or "none",
            "width": str(model.width),
            "parameters": f"{model.parameters_count / 1e6:.2f} M",
            "mean": mean,
            "std": std,
            "licence": model.origin.licence or ("unknown" if name == "teacher" else "yours"),
        }
    return shapes


def _table(shapes: Mapping[str, Mapping[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("", *shapes):
        table.add_column(column)
    for row in next(iter(shapes.values())):
        table.add_row(row, *(side[row] for side in shapes.values()))
    return table


def _load(config: CheckConfig, assembly: Assembly) -> tuple[list[Batch], float]:
    began = time.monotonic()
    loader = training_batches(
        assembly.data.train,
        assembly.view,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        start=0,
        stop=_STEPS,
        workers=0,
    )
    batches = list(plainly(loader))
    return batches, (time.monotonic() - began) / _STEPS


def _steps(assembly: Assembly, batches: list[Batch]) -> tuple[float, float]:
    """Seconds of a step, and the first loss."""
    objective, runtime = assembly.objective, assembly.runtime
    groups = parameter_groups(
        [("student.model.", objective.student.model), ("projector.", objective.projector)],
        weight_decay=0.0,
    )
    optimizer = adamw(groups, betas=(0.9, 0.999))
    set_rate(optimizer, assembly.schedule.rate(0))
    wrapped, stepper = runtime.prepare(objective, optimizer)
    objective.calibrate(runtime.batch(b) for b in batches)
    objective.train()
    times, losses = [], []
    for number, batch in enumerate(batches):
        began = time.monotonic()
        stream = SampleStream(0, number, batch.positions)
        ready = runtime.batch(Batch(batch.views, None, batch.indices, batch.positions, (), stream))
        loss = wrapped(ready)
        runtime.backward(loss, 1)
        stepper.step()
        stepper.zero_grad()
        losses.append(float(loss.total.detach()))  # waits for the device
        times.append(time.monotonic() - began)
    return min(times[1:]), losses[0]


def _memory(assembly: Assembly) -> int:
    if assembly.runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(assembly.runtime.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _say(console: Console, config: CheckConfig, result: CheckResult) -> None:
    batch = config.data.batch_size
    slower = max(result.seconds_per_step, 0.0)
    lines = [
        f"one step: {result.seconds_per_step:.2f} s for {batch} images "
        f"({batch / result.seconds_per_step:,.0f} images/s), loss {result.loss:.4f}",
        f"loading: {batch / result.seconds_per_batch_loading:,.0f} images/s a worker",
        f"memory: {result.memory_bytes / 2**30:.1f} GiB",
        f"whole run: {result.steps:,} steps, {result.views:,} views "
        f"({result.views / PUBLISHED_VIEWS:.2%} of the published {PUBLISHED_VIEWS:,}), about "
        f"{duration(result.steps * slower)} if loading keeps up",
    ]
    if result.warning:
        lines.append(result.warning)
    for line in lines:
        console.print(line, markup=False, highlight=False)
