"""A run small enough to be killed a hundred times, with everything that a resume can forget.

Its objective draws from all three global generators and keeps state between steps, its weights are
averaged, its schedule moves, and each sample that it consumes is written down at once.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from featdistill.core.errors import FeatDistillError
from featdistill.core.seeds import seeded_globals
from featdistill.core.types import Batch, Loss
from featdistill.data.sources import ArraySource
from featdistill.data.views import CropView
from featdistill.engine import checkpoint, loop, step
from featdistill.engine.average import WeightAverage
from featdistill.engine.best import Choice
from featdistill.engine.loop import fit
from featdistill.engine.optimizer import adamw, parameter_groups
from featdistill.engine.plan import Plan
from featdistill.engine.runtime import Runtime
from featdistill.engine.schedule import Schedule

STEPS, BATCH, IMAGES = 30, 4, 18  # 4 whole batches an epoch


class Restless(nn.Module):
    """Recognise an image through noise; `consumed` is appended to without a buffer."""

    def __init__(self, consumed: Path) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.Dropout(0.3), nn.GELU())
        self.head = nn.Linear(12, 3)
        self.register_buffer("running", torch.zeros(3))
        self.log = os.open(consumed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def forward(self, batch: Batch) -> Loss:
        assert batch.stream is not None
        views = [hashlib.sha256(v.numpy().tobytes()).hexdigest()[:8] for v in batch.images]
        row = [batch.stream.step, batch.indices.tolist(), views]
        os.write(self.log, (json.dumps(row) + "\n").encode())
        noisy = batch.images + 0.1 * float(np.random.normal()) + 0.1 * random.gauss(0, 1)
        scores = self.head(self.net(noisy)) - 0.1 * self.running
        self.running += 0.1 * (scores.detach().mean(0) - self.running)
        loss = (scores - batch.images.mean((2, 3))).square().mean()
        return Loss(loss, {"scale": scores.detach().abs().mean()})


def source(images: int = IMAGES, *, seed: int = 0) -> ArraySource:
    pixels = np.random.default_rng(seed).integers(0, 255, (images, 3, 8, 8), np.uint8)
    return ArraySource("made", torch.from_numpy(pixels))


def run(
    folder: Path,
    *,
    resume: bool,
    workers: int = 0,
    devices: int = 1,
    forget: str | None = None,
    data_seed: int = 0,
    **options: Any,
) -> None:
    """One session.

    Args:
        forget: what the resume is made to leave out, for the negative controls.
    """
    torch.set_num_threads(1)
    with seeded_globals("victim"):
        objective = Restless(folder / "consumed.jsonl")
    groups = parameter_groups([("", objective)], weight_decay=0.05)
    average = WeightAverage(objective, decay=0.9)
    plan = Plan(
        **{
            "source": source(seed=data_seed),
            "view": CropView(4),
            "batch_size": BATCH,
            "schedule": Schedule(STEPS, 5, 0.05, 0.001, 0.0001),
            "seed": 3,
            "clip": 1.0,
            "workers": workers,
            "log_every": 4,
            "checkpoint_every": 3,
            "eval_every": 7,
            "best": Choice("score", "min"),
            "tensorboard": False,
            "quiet": True,
            **options,
        }
    )

    def evaluate() -> dict[str, float]:
        return {"score": float(sum(p.abs().sum() for p in objective.parameters()))}

    with ExitStack() as stack:
        for patched in FORGET[forget]:
            stack.enter_context(patched)
        fit(
            objective,
            adamw(groups, betas=(0.9, 0.999)),
            plan,
            runtime=Runtime(device="cpu", devices=devices),
            folder=folder,
            resume=resume,
            evaluate=evaluate,
            average=average,
        )


def _first_step() -> Callable[..., Any]:
    """The learning rate as if the resumed session were the run's first."""
    real, seen = step.set_rates, list[int]()

    def rates(optimizer: Any, schedule: Any, number: int) -> None:
        seen.append(number)
        real(optimizer, schedule, number - seen[0])

    return rates


def _first_data(**options: Any) -> Any:
    length = options["stop"] - options["start"]
    return _batches(**{**options, "start": 0, "stop": length})


_batches = loop.training_batches
_restore = loop.restore


def _without(part: str) -> Callable[..., None]:
    """A restore that leaves something as a fresh process has it."""

    def restore(
        found: Any, objective: nn.Module, optimizer: Any, average: WeightAverage | None
    ) -> None:
        assert average is not None
        fresh = {k: v.clone() for k, v in average.state_dict().items()}
        buffer = objective.running.clone()  # type: ignore[operator]
        _restore(found, objective, optimizer, average)
        if part == "optimizer":
            optimizer.state.clear()
        elif part == "average":
            average.load_state_dict(fresh)
        else:
            objective.running.copy_(buffer)  # type: ignore[operator]

    return restore


def _random_without(*names: str) -> Callable[[Mapping[str, Tensor]], None]:
    """Generators put back, but not these."""
    real = checkpoint.restore_random

    def restore(states: Mapping[str, Tensor]) -> None:
        kept = {k: v for k, v in states.items() if not k.startswith(names)}
        real({"cpu": torch.get_rng_state(), **kept})

    return restore


FORGET: dict[str | None, list[Any]] = {
    None: [],
    "torch's generator": [patch.object(checkpoint, "restore_random", _random_without("cpu"))],
    "NumPy's generator": [patch.object(checkpoint, "restore_random", _random_without("numpy"))],
    "Python's generator": [patch.object(checkpoint, "restore_random", _random_without("python"))],
    "schedule": [patch.object(step, "set_rates", _first_step())],
    "data position": [
        patch.object(
            loop,
            "training_batches",
            lambda source, view, **options: _first_data(source=source, view=view, **options),
        )
    ],
    "optimizer": [patch.object(loop, "restore", _without("optimizer"))],
    "average": [patch.object(loop, "restore", _without("average"))],
    "buffer": [patch.object(loop, "restore", _without("buffer"))],
    "meter": [patch.object(loop.Meter, "restore", lambda self, state, runtime: None)],
}


def session(folder: Path, options: dict[str, Any]) -> None:
    """A process's whole life: its exit status is what the command line's would be."""
    multiprocessing.set_start_method("fork", force=True)  # Linux's own, not the test server's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    with open(folder / "said.txt", "a", buffering=1) as said:
        os.dup2(said.fileno(), 2)
        sys.stderr = said
        status = 0
        try:
            run(folder, **options)
        except FeatDistillError as error:
            said.write(f"{type(error).__name__}: {error}\n")
            status = error.exit_code
        except KeyboardInterrupt:
            status = 130
    if status:
        sys.exit(status)
