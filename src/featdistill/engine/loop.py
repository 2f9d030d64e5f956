"""The loop: batches, objective, gradients, step. It trains every objective of this project."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from featdistill.core.errors import FeatDistillError, Interrupted
from featdistill.core.records import computing, environment
from featdistill.core.seeds import seeded_globals
from featdistill.core.types import Batch
from featdistill.data.device_cache import DeviceImages, device_batches
from featdistill.data.loader import plainly, training_batches
from featdistill.engine.average import WeightAverage
from featdistill.engine.batches import check_batch, check_batch_norm
from featdistill.engine.best import Best
from featdistill.engine.checkpoint import (
    Checkpoint,
    Checkpoints,
    copied,
    restore,
    training_state,
)
from featdistill.engine.cost import CostMeter, Spent
from featdistill.engine.fingerprint import check_data, fingerprint
from featdistill.engine.finite import FiniteWatch, NonFiniteSteps
from featdistill.engine.ledger import Books, Ledger
from featdistill.engine.meter import Meter
from featdistill.engine.plan import FitResult, Plan
from featdistill.engine.quarantine import Quarantine
from featdistill.engine.replan import Planned, first_plan, replanned
from featdistill.engine.runtime import Runtime
from featdistill.engine.signals import StopRequest, requeue, shielded, stop_on_signals
from featdistill.engine.step import TrainingStep
from featdistill.engine.tracking import Bar, MetricsLog, duration, say
from featdistill.engine.vote import Vote
from featdistill.engine.writer import Writer


def fit(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    *,
    runtime: Runtime,
    folder: Path,
    resume: bool = False,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    average: WeightAverage | None = None,
) -> FitResult:
    """Train an objective to the end of its schedule.

    The weights after step n are a pure function of objective, data, plan and n: not of the number
    of workers or micro-batches (up to rounding), nor of stops and resumes (to the bit, on CPU).

    Args:
        objective: from `Batch` to `Loss`; its state is what checkpoints keep. If it has
            `end_step(reduce)`, that is called after each step.
        optimizer: with groups from `parameter_groups`.
        folder: the run's.
        resume: go on from the newest checkpoint.
        evaluate: scores to log, called now and then in evaluation mode.
        average: of weights of the objective, to keep up to date and in the checkpoints.

    Raises:
        Interrupted: asked to stop by a signal; the state was saved.
        NonFiniteError: the loss or a gradient was no number; the weights never saw it.
        DataError: too many images were unreadable, or the batch cannot be shared out.
        RunError: there is too little memory, for half of a micro-batch too.
    """
    # a model's own dropout draws from the global generator: it too starts from the seed
    with seeded_globals("fit", plan.seed):
        loop = open_loop(objective, optimizer, plan, runtime, folder, resume, evaluate, average)
        with closing(loop.metrics), loop.writer, stop_on_signals() as request:
            return loop.run(request)


def open_loop(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    runtime: Runtime,
    folder: Path,
    resume: bool,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    average: WeightAverage | None = None,
) -> _Loop:
    """A run at its first step, or where it was stopped; for the arguments see `fit`."""
    world, parts = runtime.share.world, plan.micro_batches
    check_batch(plan.batch_size, processes=world, micro_batches=parts)
    check_batch_norm(objective, processes=world, micro_batches=parts)
    writer = Writer()
    checkpoints = Checkpoints(folder / "checkpoints", keep=plan.checkpoint_keep, writer=writer)
    wrapped, stepper = runtime.prepare(objective, optimizer)
    if average is not None:
        average.start()  # only now are the weights on their device
    data = runtime.first_does(lambda: fingerprint(plan.source))
    meter = Meter(runtime.device)
    start, earlier, schedules = 0, Spent(), first_plan(plan.schedule)
    if resume and (checkpoint := _checkpoint_of(checkpoints, runtime)) is not None:
        check_data(checkpoint.manifest, data, plan.source)
        restore(checkpoint, objective, optimizer, average)
        start, earlier, schedules = _go_on(checkpoint, plan, runtime, meter)
    elif resume:
        say("no checkpoint was written yet: the run begins again at its first step")
    stop = min(plan.schedule.steps, plan.stop_at or plan.schedule.steps)
    metrics = MetricsLog(folder, resume_at=start, tensorboard=plan.tensorboard, first=runtime.first)
    watch = FiniteWatch(plan.source, runtime.share.rank)
    step = TrainingStep(
        objective=objective,
        wrapped=wrapped,
        optimizer=optimizer,
        stepper=stepper,
        runtime=runtime,
        schedule=plan.schedule,
        seed=plan.seed,
        clip=plan.clip,
        parts=parts,
        average=average,
        meter=meter,
        watch=watch,
    )
    return _Loop(
        start=start,
        stop=stop,
        objective=objective,
        optimizer=optimizer,
        step=step,
        ledger=Ledger(runtime, watch, lambda: _books(plan, folder, start)),
        plan=plan,
        runtime=runtime,
        metrics=metrics,
        checkpoints=checkpoints,
        writer=writer,
        cost=CostMeter(runtime.energy_counter(), earlier),
        spent=earlier,
        evaluate=evaluate,
        average=average,
        meter=meter,
        facts={
            "data_images": len(plan.source),
            "data": data,
            "schedules": schedules,
            "precision": runtime.precision,
            "environment": computing(environment()) if runtime.first else {},
        },
        best=Best(checkpoints.folder / "best", plan.best, resume=resume, writer=writer)
        if plan.best and runtime.first
        else None,
        bar=Bar(plan.title, quiet=plan.quiet or not runtime.first),
    )


def _go_on(
    checkpoint: Checkpoint, plan: Plan, runtime: Runtime, meter: Meter
) -> tuple[int, Spent, list[Planned]]:
    """What a run takes over from a checkpoint beside its state: step, costs and schedules."""
    if "meter" in checkpoint.files:
        meter.restore(checkpoint.files["meter"], runtime)
    say(f"resumed at step {checkpoint.step} from {checkpoint.path}")
    _same_precision(checkpoint, runtime)
    known = checkpoint.manifest.get("schedules")
    schedules, note = replanned(known, plan.schedule, checkpoint.step)
    if note is not None:
        say(note)
    return checkpoint.step, Spent.of_manifest(checkpoint.manifest), schedules


def _same_precision(checkpoint: Checkpoint, runtime: Runtime) -> None:
    """Go on in the precision that a run began in: by itself, another machine may pick another."""
    here, begun = runtime.precision, checkpoint.manifest.get("precision")
    if begun is not None and runtime.go_on_in(begun):  # an earlier version did not write it
        say(f"note: the run began in {begun} and goes on in it; begun here, it would be in {here}")


def _books(plan: Plan, folder: Path, start: int) -> Books:
    """The lists of what went wrong in earlier sessions, to go on with."""
    return Books(
        Quarantine(
            folder / "quarantine.jsonl", images=len(plan.source), limit=plan.bad_image_limit
        ),
        NonFiniteSteps(
            folder / "nonfinite.jsonl",
            policy=plan.nonfinite,
            limit=plan.nonfinite_limit,
            resume_at=start,
        ),
    )


def _checkpoint_of(checkpoints: Checkpoints, runtime: Runtime) -> Checkpoint | None:
    """The checkpoint to go on from, which the first process chooses for all."""

    def choose() -> int | None:
        found = checkpoints.recover()
        return None if found is None else found.step

    step = runtime.first_does(choose)
    return None if step is None else checkpoints.read(step)


@dataclass
class _Loop:
    start: int
    stop: int
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    step: TrainingStep
    ledger: Ledger
    plan: Plan
    runtime: Runtime
    metrics: MetricsLog
    checkpoints: Checkpoints
    writer: Writer
    meter: Meter
    facts: Mapping[str, Any]  # of every checkpoint: the source's fingerprint, schedules, ...
    cost: CostMeter
    spent: Spent  # as the newest checkpoint has it
    evaluate: Callable[[], Mapping[str, float]] | None
    average: WeightAverage | None
    best: Best | None
    bar: Bar
    last: dict[str, float] = field(default_factory=dict)

    def run(self, request: StopRequest) -> FitResult:
        """Take all steps."""
        with closing(self.turns(request)) as turns:
            try:
                next(turns)
                for batch in self.batches(self.start):
                    turns.send(batch)
            except StopIteration as end:
                result: FitResult = end.value
                return result
        raise AssertionError("a loop ends with its last batch")

    def turns(self, request: StopRequest) -> Generator[None, Batch, FitResult]:
        """Take a step for each batch that is sent; `engine.together` has several take turns."""
        start, stop = self.start, self.stop
        plan, began = self.plan, time.monotonic()
        meter, vote = self.meter, Vote(self.runtime, 3)
        every = plan.steps_between_evaluations
        self.bar.start(plan.schedule.steps, start)
        self.objective.train()
        saved = start
        try:
            if self.evaluate and plan.eval_first and start == 0:
                self._evaluate(0, meter)
            for step in range(start, stop):
                batch = yield
                self._step(step, batch)
                done = step + 1
                final = done == stop
                # a stop to be resumed logs nothing more: the line to come is of both sessions
                if done % plan.log_every == 0 or done == plan.schedule.steps:
                    self._log(done, meter, start, began)
                if self.evaluate and (done % every == 0 or done == plan.schedule.steps):
                    self._evaluate(done, meter)
                asked, news, failed = vote.cast(
                    request.signal or 0, int(self.ledger.news), int(self.writer.failed)
                )
                if failed:
                    self._written()
                saving = done % plan.checkpoint_every == 0 or final or asked
                if news or saving:  # so that what ends a run ends it before it is saved
                    self._share()
                if saving:
                    self._save(done)
                    saved = done
                if asked and not final:
                    self._stop(done, asked)
        finally:
            self.bar.stop()
        vote.close()
        self._written()
        assert saved == max(start, stop)
        finished = stop == plan.schedule.steps
        return FitResult(
            stop,
            finished,
            self.spent.seconds,
            self.last,
            self.spent.joules,
            tuple(self.facts["schedules"]),
        )

    def _share(self) -> None:
        """Put findings together; where they end the run, what is in flight is written before.

        They end all processes at once, and one that ends badly leaves the others no time to write.
        """
        try:
            self.ledger.share()
        except FeatDistillError:
            self.runtime.first_does(self.writer.settle)
            raise

    def _written(self) -> None:
        """Wait until all is written, or raise why it is not, on all processes."""
        self.runtime.first_does(self.writer.wait)

    def _stop(self, done: int, asked: int) -> NoReturn:
        self._written()
        # all wait for the first: a job is put back before any of its processes ends
        if asked == signal.SIGUSR1 and (line := self.runtime.first_does(requeue)):
            say(line)
        raise Interrupted(
            f"stopped at step {done} of {self.plan.schedule.steps}; the state is saved",
            signal_number=asked,
            fix="go on with the same command and --resume",
        )

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches of the steps from `start` on, timing how long the loop waits for them."""
        stop = self.stop
        if start >= stop:
            return
        iterator = self._loaded(start, stop)
        for step in range(start, stop):
            before = time.monotonic()
            batch = next(iterator)
            if self.plan.complete is not None:
                batch = self.plan.complete(step, batch)
            self.meter.waited += time.monotonic() - before
            yield batch

    def _loaded(self, start: int, stop: int) -> Iterator[Batch]:
        plan = self.plan
        if isinstance(plan.source, DeviceImages):
            return device_batches(
                plan.source,
                plan.view,
                batch_size=plan.batch_size,
                seed=plan.seed,
                start=start,
                stop=stop,
                share=self.runtime.share,
            )
        loader = training_batches(
            plan.source,
            plan.view,
            batch_size=plan.batch_size,
            seed=plan.seed,
            start=start,
            stop=stop,
            workers=plan.workers,
            share=self.runtime.share,
            pin_memory=self.runtime.device.type == "cuda",
            cache=plan.cache,
        )
        loader.worker_init_fn = shielded(loader.worker_init_fn)
        return plainly(loader)

    def _step(self, step: int, batch: Batch) -> None:
        self.ledger.add(batch.replaced)
        self.step.take(step, batch)

    def _log(self, done: int, meter: Meter, start: int, began: float) -> None:
        plan = self.plan
        values, waiting, speed = meter.take(self.runtime)
        values |= {
            "lr": plan.schedule.rate(done - 1),
            "epoch": done * plan.batch_size / len(plan.source),
            "images_per_second": speed,
            "data_wait": waiting,
        }
        if self.ledger.bad_images:
            values["bad_images"] = self.ledger.bad_images
        self.last |= values
        self.metrics.write(done, values)
        self.cost.now()  # a counter that overflows wants to be read now and then
        left = (time.monotonic() - began) / (done - start) * (plan.schedule.steps - done)
        loss = self.last.get("loss", math.nan)  # where all steps were skipped, the last known
        self.bar.update(
            done,
            f"loss {loss:.4f}  {speed:,.0f} images/s  left {duration(left)}  "
            f"waiting for data {waiting:.0%}",
        )

    def _evaluate(self, done: int, meter: Meter) -> None:
        assert self.evaluate is not None
        self.writer.room_for(done)  # for the best state; and no thread is there while it forks
        before = time.monotonic()
        self.objective.eval()
        with torch.no_grad():
            scores = dict(self.evaluate())
        self.objective.train()
        meter.pause(time.monotonic() - before)
        self.last |= scores
        self.metrics.write(done, scores)
        if self.best is not None:
            self.best.offer(done, scores, self.objective)

    def _save(self, done: int) -> None:
        spent = self.cost.now()
        self.spent = replace(spent, joules=self.runtime.sum_known(spent.joules))
        meter = self.meter.state(self.runtime)
        if not self.runtime.first:
            return
        self.writer.room_for(done)
        state = training_state(self.objective, self.optimizer, self.average)
        files = {**state, "meter": copied(meter)}
        extra = {**self.facts, **asdict(self.spent)}

        def write() -> None:
            self.metrics.sync()
            self.checkpoints.save(done, files, extra)

        self.writer.add(write)
