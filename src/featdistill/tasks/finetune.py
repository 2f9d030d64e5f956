"""`featdistill finetune`: a backbone becomes a classifier, and is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featdistill.config.commands import CompareConfig, FinetuneConfig
from featdistill.config.sections import Pool
from featdistill.core.errors import DataError
from featdistill.core.records import write_record
from featdistill.data.parts import Data, own_classes, some
from featdistill.data.sources import Source, labelled
from featdistill.data.splits import label_budget
from featdistill.data.views import FinetuneView
from featdistill.engine.average import WeightAverage
from featdistill.engine.batches import check_batch
from featdistill.engine.loop import fit
from featdistill.engine.optimizer import adamw, parameter_groups
from featdistill.engine.plan import FitResult
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.runtime import Runtime
from featdistill.engine.tracking import duration, say
from featdistill.evaluation.classification import Scores, score
from featdistill.models.backbone import Backbone
from featdistill.models.classifier import build_classifier, keeps_head
from featdistill.models.export import export_timm
from featdistill.models.exports.card import public_name
from featdistill.objectives.classification import Classification
from featdistill.tasks.caches import kept_images
from featdistill.tasks.common import (
    data_of,
    model_of,
    plain,
    plan_of,
    runtime_of,
    schedule_of,
    settle,
)
from featdistill.tasks.finetune_record import (
    by_class,
    labels_used,
    score_arrays,
    weakest,
)
from featdistill.tasks.provenance import licences_of, origin_record


@dataclass(frozen=True)
class FinetuneResult:
    """A finished (or stopped) fine-tuning.

    Attributes:
        out: the run's folder.
        export: the timm-loadable classifier; None if the run stopped early.
        top1, top5: accuracies in 0..1 on the held-out part; None if the run stopped early.
    """

    out: Path
    export: Path | None
    top1: float | None
    top5: float | None
    steps: int
    seconds: float
    last: Mapping[str, float]


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned classifier and its scores (None if the run stopped early).

    Attributes:
        average: averaged weights, if they were asked for; `average_scores` are theirs.
    """

    classifier: Backbone
    fit: FitResult
    scores: Scores | None
    average: WeightAverage | None = None
    average_scores: Scores | None = None


def check_labels(
    data: Data, *, budget: str | None, seed: int, what: str = "fine-tuning"
) -> tuple[Source, Source, tuple[str, ...]]:
    """The labelled training part within its budget, the held-out part, and the class names.

    Args:
        what: what wants the labels, for messages.

    Raises:
        DataError: no labels, nothing held out, or classes that differ.
    """
    labels = labelled(data.train, what)
    held = data.held_out
    if held is None:
        raise DataError(
            f"'{data.train.name}' has no held-out part to score on",
            fix="give --val-data, or --val-fraction 0.1, or a folder with train/ and val/",
        )
    labelled(held, "scoring")
    assert data.train.classes is not None
    assert held.classes is not None
    assert held.classes == data.train.classes  # where data are opened, strangers are refused
    lacks = sorted(set(data.train.classes) - set(own_classes(held)))
    if lacks:
        raise DataError(
            f"the held-out part '{held.name}' lacks classes of '{data.train.name}': {some(lacks)}",
            expected="the same classes in both",
            fix="add images of them, or leave them out of the training part",
        )
    train = data.train if budget is None else label_budget(data.train, budget, seed)
    if len(np.unique(labels)) < 2:
        raise DataError(f"'{data.train.name}' has a single class", expected="two or more")
    return train, held, data.train.classes


def classification(
    backbone: Backbone,
    config: FinetuneConfig | CompareConfig,
    *,
    classes: tuple[str, ...],
    runtime: Runtime,
) -> Classification:
    """The objective of a fine-tuning, with its classifier; mistakes come out here."""
    classifier = build_classifier(
        backbone,
        class_names=classes,
        pool="cls" if config.pool is Pool.CLS else "mean",
        drop_path=config.drop_path,
        head=config.head.value if isinstance(config, FinetuneConfig) else "fresh",
        seed=config.run.seed,
    )
    settle(runtime, classifier, config.run)
    mix = config.mix
    objective = Classification(
        classifier,
        mixup=mix.mixup,
        cutmix=mix.cutmix,
        mix_probability=mix.probability,
        switch=mix.switch,
        smoothing=mix.smoothing,
        erasing=config.view.erasing,
    )
    check_batch(
        config.data.batch_size,
        processes=runtime.share.world,
        micro_batches=config.run.micro_batches,
        even=objective.mixes,
    )
    finetune_view(config, classifier)
    return objective


@dataclass
class _Judge:
    """Scores a classifier, and its averaged weights if there are any; keeps the latest scores."""

    classifier: Backbone
    config: FinetuneConfig | CompareConfig
    held: Source
    runtime: Runtime
    average: WeightAverage | None
    scores: Scores | None = None
    average_scores: Scores | None = None

    def __call__(self) -> dict[str, float]:
        """The scores to log."""
        self.scores = latest = self._score()
        values = {"val_top1": latest.top1, "val_top5": latest.top5, "val_loss": latest.loss}
        if self.average is None:
            return values
        with self.average.applied():
            self.average_scores = latest = self._score()
        return values | {"val_top1_ema": latest.top1, "val_loss_ema": latest.loss}

    def _score(self) -> Scores:
        return score(
            self.classifier,
            self.held,
            batch_size=max(1, min(1024, 2 * self.config.data.batch_size)),
            crop=self.config.view.eval_crop,
            workers=self.config.data.workers,
            share=self.runtime.share,
            gather=self.runtime.gather,
        )


def tune(
    objective: Classification,
    config: FinetuneConfig | CompareConfig,
    *,
    train: Source,
    held: Source,
    runtime: Runtime,
    folder: Path,
    title: str,
) -> Tuned:
    """Fine-tune a classifier by a configuration's recipe and score it on the held-out part."""
    classifier = objective.classifier
    schedule = schedule_of(
        config.schedule, config.optimizer, images=len(train), batch_size=config.data.batch_size
    )
    groups = parameter_groups(
        [("classifier.model.", classifier.model)],
        weight_decay=config.optimizer.weight_decay,
        layer_decay=config.optimizer.layer_decay,
    )
    plan = plan_of(config, train, finetune_view(config, classifier), schedule, title=title)

    ema = config.ema if isinstance(config, FinetuneConfig) else None
    average = None if ema is None else WeightAverage(classifier.model, decay=ema)
    judge = _Judge(classifier, config, held, runtime, average)
    result = fit(
        objective,
        adamw(groups, betas=config.optimizer.betas),
        plan,
        runtime=runtime,
        folder=folder,
        resume=config.run.resume,
        evaluate=judge,
        average=average,
    )
    if not result.finished:
        return Tuned(classifier, result, None)
    if judge.scores is None:  # resumed at its end
        judge()
    return Tuned(classifier, result, judge.scores, average, judge.average_scores)


def finetune_view(config: FinetuneConfig | CompareConfig, backbone: Backbone) -> FinetuneView:
    """The training view of a configuration, at the backbone's size."""
    view = config.view
    return FinetuneView(
        size=backbone.image_size[0],
        scale=view.crop_scale,
        ratio=view.crop_ratio,
        flip=view.flip,
        randaugment=view.randaugment,
        mean=backbone.rgb[0],
    )


def run(config: FinetuneConfig) -> FinetuneResult:
    """Fine-tune, score and export."""
    check_out(config.run.out, resume=config.run.resume)
    data = data_of(config.data, config.run.seed)
    train, held, classes = check_labels(data, budget=config.data.labels, seed=config.run.seed)
    schedule = schedule_of(  # refuses what cannot be, before a model is loaded
        config.schedule, config.optimizer, images=len(train), batch_size=config.data.batch_size
    )
    runtime = runtime_of(config.run)
    backbone = model_of(config.model, image_size=config.view.image_size, seed=config.run.seed)
    objective = classification(backbone, config, classes=classes, runtime=runtime)
    seen, scored = kept_images(config.data, train, held, runtime=runtime)
    folder = open_run(
        config.run.out,
        config,
        resume=config.run.resume,
        first=runtime.first,
        weights={"model": backbone.origin.weights},
        steps=schedule.steps,
    )
    kept = keeps_head(backbone, classes, config.head.value)
    say(
        f"model  {backbone.origin.spec}, {backbone.origin.weights}; "
        f"{'its own' if kept else 'a fresh'} classifier\n"
        f"data   {len(train):,} training images of {len(classes)} classes, "
        f"{len(held):,} held out; {runtime.describe()}"
    )
    tuned = tune(
        objective,
        config,
        train=seen,
        held=scored,
        runtime=runtime,
        folder=folder,
        title="fine-tuning",
    )
    scores, result = tuned.scores, tuned.fit
    if scores is None:
        say(f"stopped at step {result.step}; go on with --resume")
        return FinetuneResult(folder, None, None, None, result.step, result.seconds, result.last)
    exported = None
    if runtime.first:
        exported = _finish(config, folder, train, tuned, scores)
    return FinetuneResult(
        folder,
        exported,
        scores.top1,
        scores.top5,
        result.step,
        result.seconds,
        result.last,
    )


def _finish_average(
    config: FinetuneConfig, folder: Path, tuned: Tuned
) -> dict[str, float | None] | None:
    """Export the averaged weights, say how good they are, and return it for the record."""
    scores, average = tuned.average_scores, tuned.average
    if scores is None or average is None:
        return None
    where = "averaged weights"
    if tuned.classifier.build is not None:
        with average.applied():
            exported = export_timm(
                tuned.classifier,
                folder / "export-ema",
                card=_card(
                    config, tuned.classifier, scores, f"averaged weights (EMA {config.ema})"
                ),
                licences=licences_of([(config.model.spec, origin_record(tuned.classifier.origin))]),
            )
        where += f" in {exported.folder}"
    say(f"{where}: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}")
    return {
        "decay": config.ema,
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "calibration_error": scores.calibration_error,
    }


def _card(
    config: FinetuneConfig, classifier: Backbone, scores: Scores, weights: str | None = None
) -> dict[str, str]:
    """What the model card of an export says."""
    name = f"{public_name(config.model.spec)} ({classifier.origin.weights})"
    return {
        "fine-tuned from": name,
        **({"weights": weights} if weights else {}),
        "data": Path(config.data.path).name,
        "top-1": f"{scores.top1:.2%} of {len(scores.labels):,} held-out images",
    }


def _finish(
    config: FinetuneConfig, folder: Path, train: Source, tuned: Tuned, scores: Scores
) -> Path | None:
    exported = None
    origin = tuned.classifier.origin
    if tuned.classifier.build is not None:
        exported = export_timm(
            tuned.classifier,
            folder / "export",
            card=_card(config, tuned.classifier, scores),
            licences=licences_of([(config.model.spec, origin_record(origin))]),
        )
    used, chosen = labels_used(config, train)
    averaged = _finish_average(config, folder, tuned)
    write_record(
        folder / "finetune.json",
        "finetune",
        config=plain(config),
        results={
            "top1": scores.top1,
            "top5": scores.top5,
            "loss": scores.loss,
            "calibration_error": scores.calibration_error,
            "mean_by_class": scores.mean_by_class,
            "by_class": by_class(scores, tuned.classifier.class_names or ()),
            "images": len(scores.labels),
            "labels": used,
            "ema": averaged,
            "steps": tuned.fit.step,
            "images_seen": tuned.fit.step * config.data.batch_size,
            "seconds": tuned.fit.seconds,
            "joules": tuned.fit.joules,
            "schedules": tuned.fit.schedules,
            "model": origin_record(origin),
        },
        arrays={**score_arrays(scores), **chosen},
    )
    say(
        f"top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%} of {len(scores.labels):,} held-out "
        f"images, in {duration(tuned.fit.seconds)}\n"
        f"calibration error {scores.calibration_error:.2%}; weakest classes: "
        f"{weakest(scores, tuned.classifier.class_names or ())}"
    )
    if exported is None:
        say(
            "plain timm has no classifier of this shape, so nothing was exported; weights: "
            f"{folder / 'checkpoints'}"
        )
        return None
    say(f"\n{exported.snippet}\n")
    say(f"next: featdistill predict --model {config.run.out} --data IMAGES")
    return exported.folder
