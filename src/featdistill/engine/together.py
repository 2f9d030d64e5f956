"""Several runs that learn from the same batches, in turns; each is the run that it would be alone.

Every run has its folder, its checkpoints, its metrics, its clipping, its guard against what is no
number, and its own states of the global generators. What they share is the batch of each step, and
what `share` makes of it for all of them at once (a teacher's pass). Of runs that go on from
different steps, the later ones wait for the others.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from featdistill.core.errors import Interrupted, NonFiniteError
from featdistill.core.seeds import Generators
from featdistill.core.types import Batch
from featdistill.engine.loop import _Loop, open_loop
from featdistill.engine.plan import FitResult, Plan
from featdistill.engine.runtime import Runtime
from featdistill.engine.signals import StopRequest, requeue, stop_on_signals
from featdistill.engine.tracking import Bar, duration, say

Share = Callable[[int, Batch], Sequence[Batch]]


@dataclass(frozen=True)
class Learner:
    """One of the runs; see `fit` for the fields.

    Attributes:
        name: what to call it.
        plan: as the others' in data, views, batch, schedule and seed.
    """

    name: str
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    plan: Plan
    folder: Path
    resume: bool
    evaluate: Callable[[], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Together:
    """How several runs went, by name.

    Attributes:
        results: of those that came to their end.
        failures: of those that met a loss or gradient that was no number.
    """

    results: Mapping[str, FitResult]
    failures: Mapping[str, NonFiniteError]


@dataclass
class _Turn:
    """A run under way."""

    name: str
    loop: _Loop
    generators: Generators
    steps: Generator[None, Batch, FitResult]
    result: FitResult | None = None
    stopped: Interrupted | None = None
    failure: NonFiniteError | None = None

    def wants(self, step: int) -> bool:
        """Whether it has yet to take this step."""
        over = (self.result, self.stopped, self.failure) != (None, None, None)
        return not over and self.loop.start <= step

    def take(self, batch: Batch | None) -> None:
        """Take a step; the first time, without a batch, all that comes before the first."""
        with self.generators.own():
            try:
                if batch is None:
                    next(self.steps)
                else:
                    self.steps.send(batch)
            except StopIteration as end:
                self.result = end.value
            except Interrupted as stopped:
                self.stopped = stopped
            except NonFiniteError as failure:
                self.failure = failure
                say(f"'{self.name}' ends here, the others go on: {failure}")
            # the others may start loading processes, and no thread is to be there while they fork
            self.loop.writer.settle()


def fit_together(learners: Sequence[Learner], *, runtime: Runtime, share: Share) -> Together:
    """Train several objectives on the same batches; each becomes what `fit` alone would make it.

    Args:
        share: from step and loaded batch to each learner's batch, in the learners' order.

    Raises:
        Interrupted: asked to stop by a signal; all states are saved.
        DataError: too many images were unreadable.
    """
    with stop_on_signals() as request, ExitStack() as stack:
        heard = StopRequest()
        turns = [_begin(each, runtime, heard, stack) for each in learners]
        _take_turns(turns, request, heard, share, quiet=not runtime.first)
        if stopped := [turn.stopped for turn in turns if turn.stopped]:
            _stop(stopped[0], request, runtime)
    return Together(
        {turn.name: turn.result for turn in turns if turn.result is not None},
        {turn.name: turn.failure for turn in turns if turn.failure is not None},
    )


def _begin(learner: Learner, runtime: Runtime, heard: StopRequest, stack: ExitStack) -> _Turn:
    generators = Generators("fit", learner.plan.seed)
    with generators.own():
        loop = open_loop(
            learner.objective,
            learner.optimizer,
            replace(learner.plan, quiet=True),  # one line tells of all
            runtime,
            learner.folder,
            learner.resume,
            learner.evaluate,
        )
    stack.callback(loop.metrics.close)
    stack.enter_context(loop.writer)
    steps = stack.enter_context(closing(loop.turns(heard)))
    return _Turn(learner.name, loop, generators, steps)


def _take_turns(
    turns: Sequence[_Turn], request: StopRequest, heard: StopRequest, share: Share, *, quiet: bool
) -> None:
    for turn in turns:
        turn.take(None)
    loops = [turn.loop for turn in turns if turn.result is None]
    if not loops:
        return
    first = min(loops, key=lambda loop: loop.start)
    progress = _Progress(turns, first, quiet=quiet)
    try:
        for step, batch in enumerate(_timed(first, loops), first.start):
            # one and the same answer for all: they stop after the same step
            told = request.signal
            heard.signal = signal.SIGTERM if told == signal.SIGUSR1 else told  # see `_stop`
            for turn, mine in zip(turns, share(step, batch), strict=True):
                if turn.wants(step):
                    turn.take(mine)
            if any(turn.stopped for turn in turns) or not any(t.wants(first.stop) for t in turns):
                return
            progress.update(step + 1)
    finally:
        progress.bar.stop()


def _timed(first: _Loop, loops: Sequence[_Loop]) -> Iterator[Batch]:
    """The batches; what the first loop waits for them, the others wait too."""
    batches = first.batches(first.start)
    while True:
        before = time.monotonic()
        batch = next(batches, None)
        waited = time.monotonic() - before
        if batch is None:
            return
        for loop in loops:
            if loop is not first:
                loop.meter.waited += waited
        yield batch


class _Progress:
    """One line for all."""

    def __init__(self, turns: Sequence[_Turn], first: _Loop, *, quiet: bool) -> None:
        self.turns, self.plan, self.start = turns, first.plan, first.start
        self.began = time.monotonic()
        self.bar = Bar(self.plan.title, quiet=quiet)
        self.bar.start(self.plan.schedule.steps, self.start)

    def update(self, done: int) -> None:
        """Say how far they are, where they have just logged."""
        if done % self.plan.log_every:
            return
        known = {t.name: t.loop.last for t in self.turns if "loss" in t.loop.last}
        losses = ", ".join(f"{name} {last['loss']:.4f}" for name, last in known.items())
        seconds = (time.monotonic() - self.began) / (done - self.start)
        left = seconds * (self.plan.schedule.steps - done)
        self.bar.update(
            done,
            f"loss {losses}  {self.plan.batch_size / seconds:,.0f} images/s  left {duration(left)}",
        )


def _stop(stopped: Interrupted, request: StopRequest, runtime: Runtime) -> NoReturn:
    """Only now that all are saved may a job be put back into the queue."""
    told = torch.tensor(float(request.signal == signal.SIGUSR1), device=runtime.device)
    if runtime.sum(told).item() and (line := runtime.first_does(requeue)):
        say(line)
    # without a signal here it was another process that was asked
    asked = request.signal or stopped.exit_code - 128
    raise Interrupted(
        f"{stopped.given.partition(';')[0]}; the states of all are saved",
        signal_number=asked,
        fix="go on with the same command and --resume",
    )
