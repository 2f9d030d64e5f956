"""The loop: batches, objective, gradients, step. It trains every objective of this project."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featdistill.core.errors import DataError, Interrupted
from featdistill.core.seeds import SampleStream, seeded_globals
from featdistill.core.types import Batch
from featdistill.data.joint_views import JointView
from featdistill.data.loader import plainly, training_batches
from featdistill.data.sources import Source
from featdistill.data.views import View
from featdistill.engine.average import WeightAverage
from featdistill.engine.batchnorm import JointBatchNorm2d
from featdistill.engine.best import Best, Choice
from featdistill.engine.checkpoint import Checkpoint, Checkpoints, restore, training_state
from featdistill.engine.cost import CostMeter, Spent
from featdistill.engine.fingerprint import check_data, fingerprint
from featdistill.engine.meter import Meter
from featdistill.engine.optimizer import set_rates
from featdistill.engine.quarantine import Quarantine
from featdistill.engine.runtime import Prepared, Runtime, StopVote
from featdistill.engine.schedule import Schedule
from featdistill.engine.signals import StopRequest, requeue, shield_worker, stop_on_signals
from featdistill.engine.tracking import Bar, MetricsLog, duration, say


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
    tensorboard: bool = True
    title: str = "training"
    quiet: bool = False

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
    """

    step: int
    finished: bool
    seconds: float
    last: Mapping[str, float] = field(default_factory=dict)
    joules: float | None = None


def check_batch(batch_size: int, *, processes: int, micro_batches: int, even: bool = False) -> None:
    """Raise DataError if a global batch cannot be shared out."""
    parts = processes * micro_batches
    if batch_size % parts:
        raise DataError(
            f"a batch of {batch_size} is not divisible by {processes} processes x "
            f"{micro_batches} micro-batches",
            fix=f"give --batch-size {max(1, batch_size // parts) * parts}",
        )
    if even and batch_size // parts % 2:
        raise DataError(
            f"mixup and cutmix pair images, and {batch_size // parts} a micro-batch is odd",
            fix="give an even --batch-size, or --mix.mixup 0 --mix.cutmix 0",
        )


def check_batch_norm(objective: nn.Module, *, processes: int, micro_batches: int) -> None:
    """Raise DataError if a batch norm would see only a part of each batch.

    Those that can see all processes' images (`engine.batchnorm`) may be spread over processes.
    """
    norms = [m for m in objective.modules() if isinstance(m, _BatchNorm) and _learns(m)]
    alone = any(not isinstance(m, JointBatchNorm2d) for m in norms)
    parts = micro_batches * (processes if alone else 1)
    if norms and parts > 1:
        raise DataError(
            f"the model has batch norm, whose statistics {parts} parts of a batch would change",
            fix="train it with one process and one micro-batch"
            if alone
            else "train it with one micro-batch",
        )


def _learns(norm: nn.Module) -> bool:
    """Whether a norm is trained; a frozen one keeps its statistics too."""
    parameters = list(norm.parameters())
    return not parameters or any(p.requires_grad for p in parameters)


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
        DataError: too many images were unreadable.
    """
    # a model's own dropout draws from the global generator: it too starts from the seed
    with seeded_globals("fit", plan.seed):
        return _fit(objective, optimizer, plan, runtime, folder, resume, evaluate, average)


def _fit(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    runtime: Runtime,
    folder: Path,
    resume: bool,
    evaluate: Callable[[], Mapping[str, float]] | None,
    average: WeightAverage | None,
) -> FitResult:
    check_batch_norm(objective, processes=runtime.share.world, micro_batches=plan.micro_batches)
    checkpoints = Checkpoints(folder / "checkpoints", keep=plan.checkpoint_keep)
    wrapped, stepper = runtime.prepare(objective, optimizer)
    if average is not None:
        average.start()  # only now are the weights on their device
    data = runtime.first_does(lambda: fingerprint(plan.source))
    meter = Meter(runtime.device)
    start, earlier = 0, Spent()
    if resume and (checkpoint := _checkpoint_of(checkpoints, runtime)) is not None:
        check_data(checkpoint.manifest, data, plan.source)
        restore(checkpoint, objective, optimizer, average)
        if "meter" in checkpoint.files:
            meter.restore(checkpoint.files["meter"])
        start, earlier = checkpoint.step, Spent.of_manifest(checkpoint.manifest)
        say(f"resumed at step {start} from {checkpoint.path}")
    elif resume:
        say("no checkpoint was written yet: the run begins again at its first step")
    stop = min(plan.schedule.steps, plan.stop_at or plan.schedule.steps)
    metrics = MetricsLog(folder, resume_at=start, tensorboard=plan.tensorboard, first=runtime.first)
    limit = plan.bad_image_limit
    loop = _Loop(
        objective=objective,
        wrapped=wrapped,
        optimizer=optimizer,
        stepper=stepper,
        plan=plan,
        runtime=runtime,
        metrics=metrics,
        checkpoints=checkpoints,
        cost=CostMeter(runtime.energy_counter(), earlier),
        spent=earlier,
        quarantine=Quarantine(folder / "quarantine.jsonl", images=len(plan.source), limit=limit),
        evaluate=evaluate,
        average=average,
        meter=meter,
        data=data,
        best=Best(checkpoints.folder / "best", plan.best, resume=resume)
        if plan.best and runtime.first
        else None,
        bar=Bar(plan.title, quiet=plan.quiet or not runtime.first),
    )
    with closing(metrics), stop_on_signals() as request:
        return loop.run(start, stop, request)


def _checkpoint_of(checkpoints: Checkpoints, runtime: Runtime) -> Checkpoint | None:
    """The checkpoint to go on from, which the first process chooses for all."""

    def choose() -> int | None:
        found = checkpoints.recover()
        return None if found is None else found.step

    step = runtime.first_does(choose)
    return None if step is None else checkpoints.read(step)


@dataclass
class _Loop:
    objective: nn.Module
    wrapped: Prepared
    optimizer: torch.optim.Optimizer
    stepper: Any
    plan: Plan
    runtime: Runtime
    metrics: MetricsLog
    checkpoints: Checkpoints
    meter: Meter
    data: Mapping[str, Any]  # the source's fingerprint
    cost: CostMeter
    spent: Spent  # as the newest checkpoint has it
    quarantine: Quarantine
    evaluate: Callable[[], Mapping[str, float]] | None
    average: WeightAverage | None
    best: Best | None
    bar: Bar
    last: dict[str, float] = field(default_factory=dict)

    def run(self, start: int, stop: int, request: StopRequest) -> FitResult:
        plan, began = self.plan, time.monotonic()
        meter, vote = self.meter, StopVote(self.runtime)
        every = plan.steps_between_evaluations
        self.bar.start(plan.schedule.steps, start)
        self.objective.train()
        saved = start
        try:
            if self.evaluate and plan.eval_first and start == 0:
                self._evaluate(0, meter)
            for step, batch in enumerate(self._batches(start, stop, meter), start):
                self.quarantine.add(batch.replaced)
                self._step(step, batch, meter)
                done = step + 1
                final = done == stop
                # a stop to be resumed logs nothing more: the line to come is of both sessions
                if done % plan.log_every == 0 or done == plan.schedule.steps:
                    self._log(done, meter, start, began)
                if self.evaluate and (done % every == 0 or done == plan.schedule.steps):
                    self._evaluate(done, meter)
                asked = vote.cast(request.signal)
                if done % plan.checkpoint_every == 0 or final or asked:
                    meter.check()
                    self._save(done)
                    saved = done
                if asked and not final:
                    self._stop(done, asked)
        finally:
            self.bar.stop()
        vote.close()
        assert saved == max(start, stop)
        finished = stop == plan.schedule.steps
        return FitResult(stop, finished, self.spent.seconds, self.last, self.spent.joules)

    def _stop(self, done: int, asked: int) -> NoReturn:
        if asked == signal.SIGUSR1 and self.runtime.first and (line := requeue()):
            say(line)
        raise Interrupted(
            f"stopped at step {done} of {self.plan.schedule.steps}; the state is saved",
            signal_number=asked,
            fix="go on with the same command and --resume",
        )

    def _batches(self, start: int, stop: int, meter: Meter) -> Iterator[Batch]:
        """Batches of the steps to do, timing how long the loop waits for them."""
        if start >= stop:
            return
        loader = training_batches(
            self.plan.source,
            self.plan.view,
            batch_size=self.plan.batch_size,
            seed=self.plan.seed,
            start=start,
            stop=stop,
            workers=self.plan.workers,
            share=self.runtime.share,
            pin_memory=self.runtime.device.type == "cuda",
        )
        loader.worker_init_fn = shield_worker
        iterator = plainly(loader)
        while True:
            before = time.monotonic()
            batch = next(iterator, None)
            meter.waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def _step(self, step: int, batch: Batch, meter: Meter) -> None:
        set_rates(self.optimizer, self.plan.schedule, step)
        parts = batch.split(self.plan.micro_batches)
        for number, part in enumerate(parts, 1):
            stream = SampleStream(self.plan.seed, step, part.positions)
            ready = self.runtime.batch(replace(part, stream=stream))
            with self.runtime.accumulating(self.wrapped, more=number < len(parts)):
                loss = self.wrapped(ready)
                self.runtime.backward(loss, len(parts))
            meter.add(loss.total, loss.parts, len(batch) / len(parts))
        bad = self._descend(meter)
        if self.average is not None:
            self.average.update(step, bad)
        end_step = getattr(self.objective, "end_step", None)
        if end_step is not None:
            end_step(self.runtime.sum)

    def _descend(self, meter: Meter) -> Tensor:
        """Clip and step, unless the gradient is no number; decided without asking the device.

        Returns:
            On the device, 1 if there was no step, else 0.
        """
        parameters = [
            p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.plan.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.plan.clip, norm)
        bad = (~torch.isfinite(norm)).float()
        # fused AdamW leaves weights and averages alone where this is 1 (GradScaler's own switch)
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.stepper.step()
        self.stepper.zero_grad()
        meter.observe(norm, bad)
        return bad

    def _log(self, done: int, meter: Meter, start: int, began: float) -> None:
        plan = self.plan
        values, waiting, speed = meter.take(self.runtime)
        values |= {
            "lr": plan.schedule.rate(done - 1),
            "epoch": done * plan.batch_size / len(plan.source),
            "images_per_second": speed,
            "data_wait": waiting,
        }
        if len(self.quarantine):
            values["bad_images"] = len(self.quarantine)
        self.last |= values
        self.metrics.write(done, values)
        self.cost.now()  # a counter that overflows wants to be read now and then
        left = (time.monotonic() - began) / (done - start) * (plan.schedule.steps - done)
        self.bar.update(
            done,
            f"loss {values['loss']:.4f}  {speed:,.0f} images/s  left {duration(left)}  "
            f"waiting for data {waiting:.0%}",
        )

    def _evaluate(self, done: int, meter: Meter) -> None:
        assert self.evaluate is not None
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

        def save() -> None:
            self.metrics.sync()
            state = training_state(self.objective, self.optimizer, self.average)
            extra = {"data_images": len(self.plan.source), "data": self.data, **asdict(self.spent)}
            self.checkpoints.save(done, {**state, "meter": meter}, extra)

        self.runtime.first_does(save)
