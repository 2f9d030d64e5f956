"""The paper-style linear probe: random crops, one setting, through the training loop."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from featdistill.config.commands.probing import OnlineConfig, ProbeCommandConfig
from featdistill.config.training import OptimizerConfig, ScheduleConfig
from featdistill.data.sources import Source
from featdistill.data.splits import label_budget
from featdistill.data.views import EvalView, FinetuneView
from featdistill.engine.loop import fit
from featdistill.engine.optimizer import Lars, parameter_groups, sgd
from featdistill.engine.plan import Plan
from featdistill.engine.runtime import Runtime
from featdistill.engine.schedule import Schedule
from featdistill.evaluation.classification import Scores, score_logits
from featdistill.evaluation.linear import Linear
from featdistill.evaluation.vectors import parts_of
from featdistill.models.backbone import Backbone
from featdistill.models.modes import evaluating
from featdistill.models.pooling import Vector, vector_of
from featdistill.objectives.probing import LinearProbe
from featdistill.tasks.common import plain_plan_of, schedule_of
from featdistill.tasks.probe_record import ModelProbe, SeedProbe, read_fit, write_fit

_EPOCHS = 90  # MAE's and MoCo v3's


def schedule_for(config: ProbeCommandConfig, images: int) -> Schedule:
    """The schedule in steps; 90 epochs unless the configuration says otherwise.

    Raises:
        DataError: the batch is larger than the data.
    """
    length: ScheduleConfig = config.schedule
    if length.epochs is None and length.steps is None:
        length = length.model_copy(update={"epochs": _EPOCHS})
    online = config.probe.online
    rates = OptimizerConfig(lr=online.lr, lr_per_512=online.lr_per_512)
    return schedule_of(length, rates, images=images, batch_size=config.data.batch_size)


def probe_online(
    backbone: Backbone,
    config: ProbeCommandConfig,
    *,
    train: Source,
    held: Source,
    runtime: Runtime,
    folder: Path,
    title: str,
) -> ModelProbe:
    """Train a head for each seed, and score it after the last step.

    Args:
        folder: each seed's run lies in it; a run that was stopped goes on.

    Raises:
        Interrupted: asked to stop by a signal; the state was saved.
    """
    runtime.settle(backbone)
    vector = vector_of(backbone, config.probe.pool.value, config.probe.layers)
    channels = sum(part.shape[0] for part in parts_of(backbone, vector))
    runs = []
    for seed in config.seeds:
        place = folder / f"seed-{seed}"
        run = read_fit(place)
        if run is None:
            one = _OnlineFit(config, seed, train, held, runtime, place, f"{title}, seed {seed}")
            run = one.run(backbone, vector, channels)
        runs.append(run)
    return ModelProbe(channels, tuple(runs))


@dataclass
class _OnlineFit:
    """One seed's head: trained, scored, kept."""

    config: ProbeCommandConfig
    seed: int
    train: Source
    held: Source
    runtime: Runtime
    folder: Path
    title: str
    scores: Scores | None = None

    def run(self, backbone: Backbone, vector: Vector, channels: int) -> SeedProbe:
        config, runtime, online = self.config, self.runtime, self.config.probe.online
        budget, labelled = config.data.labels, None
        source = self.train
        if budget is not None:
            some = label_budget(self.train, budget, self.seed)
            source, labelled = some, some.chosen
        classes = len(self.train.classes or ())
        objective = LinearProbe(
            backbone,
            vector,
            channels=channels,
            classes=classes,
            norm=online.norm == "batch",
            total=runtime.sum,
            seed=self.seed,
        )
        schedule = schedule_for(config, len(source))
        if runtime.first:  # another's folder would make the run's look taken, before it is claimed
            self.folder.mkdir(parents=True, exist_ok=True)
        result = fit(
            objective,
            _optimizer(objective, online),
            self._plan(source, backbone, schedule),
            runtime=runtime,
            folder=self.folder,
            resume=config.run.resume,
            evaluate=lambda: self._judge(objective, classes),
        )
        if self.scores is None:  # resumed at its end
            with evaluating(objective):
                self._judge(objective, classes)
        assert self.scores is not None
        facts = {
            "lr": schedule.peak,
            "weight_decay": online.weight_decay,
            "edge": [],
            "steps": schedule.steps,
            "labels": len(source),
            "seconds": result.seconds,
        }
        run = SeedProbe(self.seed, Linear(*objective.folded()), self.scores, facts, labelled)
        if runtime.first:
            write_fit(self.folder, run)
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        runtime.barrier()
        return run

    def _judge(self, objective: LinearProbe, classes: int) -> dict[str, float]:
        backbone, runtime = objective.backbone, self.runtime
        with runtime.autocast():
            self.scores = latest = score_logits(
                objective.logits,
                self.held,
                EvalView(backbone.image_size[0], self.config.view.eval_crop),
                device=runtime.device,
                classes=classes,
                batch_size=self.config.data.batch_size,
                workers=self.config.data.workers,
                share=runtime.share,
                gather=runtime.gather,
            )
        return {"val_top1": latest.top1, "val_top5": latest.top5, "val_loss": latest.loss}

    def _plan(self, source: Source, backbone: Backbone, schedule: Schedule) -> Plan:
        config, view = self.config, self.config.view
        cut = FinetuneView(
            size=backbone.image_size[0],
            scale=view.crop_scale,
            ratio=view.crop_ratio,
            flip=view.flip,
            randaugment=None,
            mean=backbone.rgb[0],
        )
        plan = plain_plan_of(config, source, cut, schedule, title=self.title)
        return replace(plan, seed=self.seed)


def _optimizer(objective: LinearProbe, online: OnlineConfig) -> torch.optim.Optimizer:
    groups = parameter_groups([("head.", objective.head)], weight_decay=online.weight_decay)
    if online.optimizer == "lars":
        return Lars(groups, momentum=online.momentum)
    return sgd(groups, momentum=online.momentum)
