"""A dry step before the long work: does it fit, and what will the whole cost.

It runs on a copy of the student, so that the run that follows is the same to the bit.
"""

from __future__ import annotations

import copy
import math
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from featdistill.config.commands import DistillConfig
from featdistill.core.errors import FeatDistillError, NonFiniteError, RunError
from featdistill.core.seeds import SampleStream, seeded_globals
from featdistill.core.types import Batch
from featdistill.data.device_cache import DeviceImages, device_batches
from featdistill.data.loader import plainly, training_batches
from featdistill.engine.batches import is_out_of_memory
from featdistill.engine.optimizer import set_rates
from featdistill.engine.runtime import Runtime
from featdistill.engine.tracking import duration
from featdistill.models.blocks import compile_blocks
from featdistill.objectives.distillation import FeatureDistillation, taught_together
from featdistill.report.tables import room
from featdistill.tasks.assembly import Assembly, optimizer_of
from featdistill.tasks.describe import wrapped

_LONG = 10.0  # seconds of a step that is worth no second one: warming up is little of it


@dataclass(frozen=True)
class Cost:
    """What a distillation costs, by a dry step of the first process.

    Attributes:
        loading: seconds to load a batch in one process.
        filling: seconds of the teacher's pass before the first step; None: it is in every step.
        teacher: seconds of the teacher's forward pass.
        student: seconds of everything else: both of the student's passes and the optimiser.
        workers: loading processes of each training process.
        processes: training processes.
        memory: peak bytes of this process (CPU) or of the device's allocator (CUDA).
        device_memory: bytes that the device has; None on CPU.
        loss: of the dry step.
        seconds: of the whole run.
        disk: bytes of the checkpoints and the export.
        free: bytes free where they will be; None if nothing will be written.
    """

    loading: float
    filling: float | None
    teacher: float
    student: float
    workers: int
    processes: int
    memory: int
    device_memory: int | None
    loss: float
    seconds: float
    disk: int
    free: int | None

    @property
    def step(self) -> float:
        """Seconds of a step, loading left out."""
        return self.student if self.filling is not None else self.teacher + self.student

    @property
    def waiting(self) -> float:
        """Seconds of a step that its batch takes to load, with all workers at it."""
        return self.loading / max(1, self.workers)

    def _loaders(self) -> str:
        if self.workers == 0:
            return "in the training process itself"
        enough = math.ceil(self.loading / self.step)
        slow = self.waiting > 1.2 * self.step
        more = f": slower than the step, {enough} would keep up (--workers)" if slow else ""
        return f"in a worker, of {self.workers}{more}"

    def lines(self, batch_size: int, width: int) -> list[str]:
        """The cost in words, on lines of so many columns."""
        of = f" of {room(self.device_memory)}" if self.device_memory else ""
        free = "" if self.free is None else f", {room(self.free)} free"
        talk = (
            f", and the exchange of gradients between {self.processes} processes"
            if self.processes > 1
            else ""
        )
        teacher, student = _seconds(self.teacher), _seconds(self.student)
        shares = (
            f"teacher {teacher}, student {student}"
            if self.filling is None
            else f"the student alone, since the cache spares the teacher's {teacher}"
        )
        facts = {
            "dry step": f"{_seconds(self.step)} for {batch_size:,} images "
            f"({batch_size / self.step:,.0f} images/s): {shares}; loss {self.loss:.4f}",
            **(
                {"first": f"about {duration(self.filling)} to fill the teacher cache"}
                if self.filling
                else {}
            ),
            "loading": f"{_seconds(self.loading)} a batch {self._loaders()}",
            "memory": f"{room(self.memory)}{of} at the peak",
            "disk": f"{room(self.disk)} for checkpoints and export{free}",
            "whole run": f"about {duration(self.seconds)}{talk}",
        }
        return [line for name, fact in facts.items() for line in wrapped(name, fact, width)]


def preflight(
    config: DistillConfig,
    assembly: Assembly,
    *,
    others: Sequence[Assembly] = (),
    timed: int = 1,
) -> Cost:
    """Take a step that leaves no trace, and say what the run will cost.

    Every process takes a step of its own, without a word to the others until all are done, so
    that none waits for one that failed.

    Args:
        others: students that learn with this one.
        timed: steps to time, after one that warms up; long steps are taken only once.

    Raises:
        RunError: out of memory, or too little room on the disk.
        NonFiniteError: the loss is no number.
        DataError: the images cannot be read.
    """
    runtime, disk, free = assembly.runtime, 0, None
    found, failure = None, None
    try:
        disk, free = _disk(config, assembly, others)
        with _generators_kept(runtime.device):
            found = _measure(config, assembly, others, timed)
    except (FeatDistillError, RuntimeError, MemoryError) as error:
        failure = error
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    mistake = None if failure is None else _explained(failure, config, assembly)
    if mistake is not None and not isinstance(mistake, FeatDistillError):
        raise mistake from None
    runtime.together(mistake)
    assert found is not None
    loading, teacher, student, memory, loss = found
    workers = config.data.workers
    if isinstance(assembly.data.train, DeviceImages):
        workers = 0
    cost = Cost(
        loading=loading,
        filling=None,
        teacher=teacher,
        student=student,
        workers=runtime.share.workers if workers is None else workers,
        processes=runtime.share.world,
        memory=memory,
        device_memory=_device_memory(runtime.device),
        loss=loss,
        seconds=0.0,
        disk=disk,
        free=free,
    )

    def with_loading(seconds: float) -> float:
        return max(seconds, cost.waiting) if cost.workers else seconds + cost.loading

    if (kept := assembly.kept) is not None:
        batches = kept.need.images / config.data.batch_size
        cost = replace(cost, filling=batches * with_loading(teacher))
    seconds = with_loading(cost.step) * assembly.schedule.steps
    return replace(cost, seconds=seconds + (cost.filling or 0.0))


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Put every random generator back to where it was."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), seeded_globals("preflight"):
        yield


def _measure(
    config: DistillConfig, assembly: Assembly, others: Sequence[Assembly], timed: int
) -> tuple[float, float, float, int, float]:
    """Seconds of loading, teacher and student, peak memory, and the loss."""
    runtime = assembly.runtime
    batches, loading = _load(config, assembly, timed + 1)
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    teacher, copies = assembly.objective.teacher, []
    # of the copies, everything may change: weights, batch norm, the whitening's statistics
    for each in (assembly, *others):
        objective = copy.deepcopy(each.objective, {id(teacher): teacher})
        objective.to(runtime.device).to_device(runtime.device)
        if config.run.compile == "on":
            compile_blocks(objective.student)  # a copy of what is compiled is not
        copies.append(objective)
    steps = _steps(config, assembly, copies, batches)
    best = min(steps[1:] or steps, key=lambda s: s.total)
    memory = _peak_memory(runtime.device)
    if not math.isfinite(best.loss):
        raise NonFiniteError(
            f"the loss of a dry step is {best.loss}",
            fix="try --precision float32, or look at the teacher's weights and features",
        )
    return loading, best.teacher, best.total - best.teacher, memory, best.loss


def _load(config: DistillConfig, assembly: Assembly, count: int) -> tuple[list[Batch], float]:
    """The run's first batches, and the seconds that the fastest took."""
    source, share = assembly.data.train, assembly.runtime.share
    size, seed = config.data.batch_size, config.run.seed
    if isinstance(source, DeviceImages):
        loaded = device_batches(
            source, assembly.view, batch_size=size, seed=seed, start=0, stop=count, share=share
        )
    else:
        loader = training_batches(
            source,
            assembly.view,
            batch_size=size,
            seed=seed,
            start=0,
            stop=count,
            workers=0,
            share=share,
        )
        loaded = plainly(loader)
    batches, times, began = [], [], time.monotonic()
    for batch in loaded:
        batches.append(batch)
        times.append(time.monotonic() - began)
        began = time.monotonic()
    return batches, min(times)


@dataclass(frozen=True)
class _Step:
    total: float
    teacher: float
    loss: float


def _steps(
    config: DistillConfig,
    assembly: Assembly,
    objectives: Sequence[FeatureDistillation],
    batches: Sequence[Batch],
) -> list[_Step]:
    """Whole training steps of a process by itself, as the loop would take them."""
    runtime, parts = assembly.runtime, config.run.micro_batches
    optimizers = [optimizer_of(config, objective) for objective in objectives]
    for objective, optimizer in zip(objectives, optimizers, strict=True):
        set_rates(optimizer, assembly.schedule, 0)
        with runtime.autocast():
            objective.calibrate(runtime.batch(p) for p in batches[0].split(parts))
        objective.train()
    steps = []
    with _Clock(objectives[0].teacher, runtime) as clock:
        for number, batch in enumerate(batches):
            clock.seconds, began, losses = 0.0, clock.now(), []
            for part in batch.split(parts):
                stream = SampleStream(config.run.seed, number, part.positions)
                ready = runtime.batch(replace(part, stream=stream))
                with runtime.autocast():
                    said = taught_together(objectives, ready) if len(objectives) > 1 else [None]
                for objective, taught in zip(objectives, said, strict=True):
                    with runtime.autocast():
                        loss = objective(replace(ready, taught=taught))
                    (loss.total / parts).backward()
                    losses.append(loss.total.detach() / len(objectives))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            steps.append(_Step(clock.now() - began, clock.seconds, float(sum(losses)) / parts))
            compiling = number == 0 and config.run.compile == "on"
            if steps[-1].total > _LONG and not compiling:
                break
    return steps


class _Clock:
    """Times a model's forward passes, waiting for the device before and after."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self.model, self.device = model, runtime.device
        self.seconds, self._began = 0.0, 0.0

    def now(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def __enter__(self) -> _Clock:
        self._hooks = [
            self.model.register_forward_pre_hook(self._before),
            self.model.register_forward_hook(self._after),
        ]
        return self

    def _before(self, *_: Any) -> None:
        self._began = self.now()

    def _after(self, *_: Any) -> None:
        self.seconds += self.now() - self._began

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _explained(error: Exception, config: DistillConfig, assembly: Assembly) -> Exception:
    """An error of the dry step as a user should read it."""
    if not is_out_of_memory(error):
        return error
    runtime, parts = assembly.runtime, config.run.micro_batches
    images = config.data.batch_size // runtime.share.world
    finer = next((n for n in range(parts + 1, images + 1) if images % n == 0), None)
    if any(isinstance(m, _BatchNorm) for m in assembly.objective.modules()):
        finer = None
    where = "the GPU" if runtime.device.type == "cuda" else "this machine"
    return RunError(
        f"{where} has too little memory for a step of {images // parts} images at "
        f"{assembly.view.size}x{assembly.view.size} with this teacher and student",
        fix=(f"give --run.micro_batches {finer} (the same training), or " if finer else "give ")
        + "a smaller --batch-size or --image-size, or smaller models",
    )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def _written(config: DistillConfig, assembly: Assembly) -> int:
    """Bytes that a student's run will write."""
    objective, run = assembly.objective, config.run
    state = sum(t.numel() * t.element_size() for t in objective.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    written = math.ceil(assembly.schedule.steps / run.checkpoint_every)
    # a new checkpoint is whole before the oldest goes
    kept = min(run.checkpoint_keep + 1, written)
    student = sum(p.numel() * p.element_size() for p in objective.student.parameters())
    need = kept * (state + 2 * trained) + student
    if assembly.best is not None:
        need += 2 * state + student  # the new best beside the old, and its export
    return need


def _disk(
    config: DistillConfig, assembly: Assembly, others: Sequence[Assembly]
) -> tuple[int, int | None]:
    """Bytes that the run will write, and those that are free where it will (if it will).

    Raises:
        RunError: too few are.
    """
    run, need = config.run, sum(_written(config, each) for each in (assembly, *others))
    if not run.out or not assembly.runtime.first:
        return need, None
    folder = Path(run.out).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        raise RunError(
            f"the run will write {room(need)} to '{run.out}', where {room(free)} are free",
            fix="make room, give another --out, or a smaller --run.checkpoint_keep",
        )
    return need, free


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value < 0.1 else f"{value:.2f} s"
