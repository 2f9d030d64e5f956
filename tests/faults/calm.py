"""A run whose result does not depend on how many processes it has, and what can go wrong in it.

Its objective draws nothing, compares with targets whose statistics are of all processes, and
writes down what each process sees of a step.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from featdistill.core.errors import DataError, FeatDistillError
from featdistill.core.seeds import seeded_globals
from featdistill.core.types import Batch, Loss
from featdistill.data.decode import BadImage
from featdistill.data.sources import ArraySource
from featdistill.data.views import CropView
from featdistill.engine.average import WeightAverage
from featdistill.engine.loop import fit
from featdistill.engine.optimizer import adamw, parameter_groups
from featdistill.engine.peers import one_fate
from featdistill.engine.plan import FitResult, Plan
from featdistill.engine.runtime import Runtime
from featdistill.engine.schedule import Schedule
from featdistill.objectives.whitening import Standardize
from tests.faults import victim

STEPS, BATCH, IMAGES = 8, 8, 40
RANK = "LOCAL_RANK"


def rank() -> int:
    return int(os.environ.get(RANK, "0"))


class Calm(nn.Module):
    """Learn whitened colours; `fault(place, step, value)` may change a value or raise."""

    def __init__(self, folder: Path, fault: Callable[[str, int, Tensor], Tensor]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.GELU(), nn.Linear(12, 3))
        self.whitening = Standardize(3, momentum=0.2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.fault = fault
        self.log = open(folder / f"consumed-{rank()}.jsonl", "ab", buffering=0)  # noqa: SIM115

    def forward(self, batch: Batch) -> Loss:
        assert batch.stream is not None
        step = batch.stream.step
        row = [step, batch.positions.tolist(), batch.indices.tolist()]
        self.log.write((json.dumps(row) + "\n").encode())
        self.seen += 1
        teacher = self.fault("teacher", step, batch.images.mean((2, 3))[:, None])
        target = self.whitening(teacher)
        found = self.fault("gradient", step, self.net(batch.images))
        total = self.fault("loss", step, (found - target[:, 0]).square().mean())
        return Loss(total, {"size": found.detach().abs().mean()}, {"teacher": target.sum()})

    def end_step(self, reduce: Any) -> None:
        self.whitening.end_step(reduce)


class _Steep(torch.autograd.Function):
    """The same value, and a gradient that is no number."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, slope: Tensor) -> Tensor:
        return slope * float("nan")


BAD: dict[str, Callable[[Tensor], Tensor]] = {
    "loss": lambda x: x * float("nan"),
    "infinite loss": lambda x: x + float("inf"),  # whose gradient is finite
    "teacher": lambda x: x.index_fill(0, torch.tensor([0]), float("inf")),
    "gradient": _Steep.apply,
}


def poison(what: str, *, steps: Sequence[int], ranks: Sequence[int]) -> Callable[..., Tensor]:
    """Something is no number at some steps (from 0) of some processes."""

    def fault(place: str, step: int, value: Tensor) -> Tensor:
        here = what.removeprefix("infinite ") == place
        return BAD[what](value) if here and step in steps and rank() in ranks else value

    return fault


def failing(kind: str, *, step: int, ranks: Sequence[int]) -> Callable[..., Tensor]:
    """Some processes fail at a step."""

    def fault(place: str, at: int, value: Tensor) -> Tensor:
        if place == "teacher" and at == step and rank() in ranks:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {
                "data": DataError(f"process {rank()} has no images", fix="look for them"),
                "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                "defect": ZeroDivisionError("a defect"),
            }[kind]
        return value

    return fault


def fine(place: str, step: int, value: Tensor) -> Tensor:
    return value


FAULTS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "poison": poison,
    "failing": failing,
}


class Spoilt(ArraySource):
    """Some images cannot be read, and to read some never ends in a loading process."""

    spoilt: frozenset[int] = frozenset()
    endless: frozenset[int] = frozenset()

    def read(self, index: int) -> Tensor:
        if index in type(self).endless and get_worker_info() is not None:
            signal.pause()
        if index in type(self).spoilt:
            raise BadImage("cut off")
        return super().read(index)


def run(
    folder: Path,
    *,
    resume: bool = False,
    devices: int = 1,
    fault: tuple[str, dict[str, Any]] | None = None,
    spoilt: tuple[int, ...] = (),
    endless: tuple[int, ...] = (),
    **options: Any,
) -> FitResult:
    """One session of one process."""
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    with seeded_globals("calm"):
        objective = Calm(folder, fine if fault is None else FAULTS[fault[0]](**fault[1]))
    images = victim.source(IMAGES)
    Spoilt.spoilt, Spoilt.endless = frozenset(spoilt), frozenset(endless)
    plan = Plan(
        **{
            "source": Spoilt("made", images.images),
            "view": CropView(4),
            "batch_size": BATCH,
            "schedule": Schedule(STEPS, 2, 0.05, 0.001, 0.0001),
            "seed": 3,
            "clip": 1.0,
            "workers": 0,
            "log_every": 1,
            "checkpoint_every": 100,
            "tensorboard": False,
            "quiet": True,
            **options,
        }
    )
    return fit(
        objective,
        adamw(parameter_groups([("", objective)], weight_decay=0.05), betas=(0.9, 0.999)),
        plan,
        runtime=Runtime(device="cpu", devices=devices),
        folder=folder,
        resume=resume,
        average=WeightAverage(objective.net, decay=0.9),
    )


def member(folder: Path, options: dict[str, Any]) -> None:
    """One of several processes: what it says and exits with is what the command does."""
    os.environ |= options.pop("environment")
    work = options.pop("work", run)
    multiprocessing.set_start_method("fork", force=True)
    status = 0
    with open(folder / f"said-{rank()}.txt", "a", buffering=1) as said:
        os.dup2(said.fileno(), 2)
        sys.stderr = said
        try:
            with one_fate():
                work(folder, **options)
        except FeatDistillError as error:
            if not error.said:
                said.write(f"error: {error}\n")
            status = error.exit_code
        except Exception as error:
            said.write(f"Traceback: {error!r}\n")
            status = 1
        with contextlib.suppress(SystemExit):
            atexit._run_exitfuncs()  # as at the end of a process that multiprocessing did not start
    os._exit(status)
