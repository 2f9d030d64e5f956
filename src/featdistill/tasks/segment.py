"""`featdistill segment`: a backbone becomes a segmenter, is scored, and predicts masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from featdistill.config.commands import SegmentConfig
from featdistill.core.errors import DataError
from featdistill.data.masks import PairSource
from featdistill.data.segmentation import SegmentationData
from featdistill.engine.average import WeightAverage
from featdistill.engine.batches import check_batch, check_batch_norm
from featdistill.engine.batchnorm import join_batch_norms
from featdistill.engine.loop import fit
from featdistill.engine.optimizer import adamw, parameter_groups
from featdistill.engine.plan import FitResult
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.runtime import Runtime
from featdistill.engine.tracking import say
from featdistill.evaluation.position_prior import PositionPrior
from featdistill.evaluation.segmentation import SegmentationScores
from featdistill.evaluation.segmenter import score_segmenter
from featdistill.models.backbone import Backbone
from featdistill.models.segmenter import (
    Segmenter,
    build_segmenter,
    describe,
    pooled_over_batch,
)
from featdistill.models.segmenter_files import Trained, load_segmenter
from featdistill.objectives.segmentation import Segmentation
from featdistill.tasks import segment_predict
from featdistill.tasks.common import model_of, plan_of, runtime_of, schedule_of, settle
from featdistill.tasks.segment_parts import (
    counting,
    crop_of,
    looks_of,
    many_looks,
    pairs_of,
    shape_of,
    short_of,
    survey,
)
from featdistill.tasks.segment_predict import SegmentPredictResult
from featdistill.tasks.segment_record import Outcome, finish


@dataclass(frozen=True)
class SegmentResult:
    """A finished (or stopped) training of a segmenter, or the scores of one.

    Attributes:
        out: the run's folder.
        export: the segmenter's folder; None if the run stopped early or only scored.
        miou, macc, aacc: 0..1 on the held-out part; None if the run stopped early.
        prior_miou: of the best prediction that ignores the image.
    """

    out: Path
    export: Path | None
    miou: float | None
    macc: float | None
    aacc: float | None
    prior_miou: float | None
    steps: int
    seconds: float
    last: Mapping[str, float] = field(default_factory=dict)


def run(config: SegmentConfig) -> SegmentResult | SegmentPredictResult:
    """Train and score a segmenter, only score it, or predict masks with it."""
    if config.predict is not None:
        return segment_predict.run(config)
    check_out(config.run.out, resume=config.run.resume)
    data, held = pairs_of(config)
    if config.train == "none":
        return _score(config, data, held)
    return _train(config, data, held)


def _train(config: SegmentConfig, data: SegmentationData, held: PairSource) -> SegmentResult:
    batch = config.data.batch_size
    schedule = schedule_of(  # refuses what cannot be, before a model is loaded
        config.schedule, config.optimizer, images=len(data.train), batch_size=batch
    )
    runtime = runtime_of(config.run)
    objective = objective_of(config, model_of(config.model, seed=config.run.seed), data, runtime)
    segmenter = objective.segmenter
    prior = survey(data, held, quiet=not runtime.first)
    origin = segmenter.backbone.origin
    folder = open_run(
        config.run.out,
        config,
        resume=config.run.resume,
        first=runtime.first,
        weights={"model": origin.weights},
        steps=schedule.steps,
    )
    say(
        f"model  {origin.spec}, {origin.weights}{' (frozen)' if segmenter.frozen else ''}\n"
        f"head   {describe(segmenter)}\n"
        f"data   {len(data.train):,} training images of {len(data.classes)} classes, "
        f"{len(held):,} held out; {runtime.describe()}"
    )
    tuned, judge = fit_segmenter(config, objective, data, held, runtime=runtime, folder=folder)
    if not tuned.finished:
        say(f"stopped at step {tuned.step}; go on with --resume")
        return SegmentResult(
            folder, None, None, None, None, None, tuned.step, tuned.seconds, tuned.last
        )
    return _finished(config, judge, prior, folder, tuned, data)


def objective_of(
    config: SegmentConfig, backbone: Backbone, data: SegmentationData, runtime: Runtime
) -> Segmentation:
    """The objective with a segmenter on the backbone; set-ups that cannot learn come out here."""
    segmenter = build_segmenter(
        backbone,
        size=config.view.size,
        class_names=data.classes,
        shape=shape_of(config),
        drop_path=0.0 if config.train == "head" else config.drop_path,
        frozen=config.train == "head",
        bias_resampling=config.model.bias_resampling,
        seed=config.run.seed,
    )
    settle(runtime, segmenter, config.run)
    looks_of(config, segmenter)
    batch, parts = config.data.batch_size, config.run.micro_batches
    check_batch(batch, processes=runtime.share.world, micro_batches=parts)
    if runtime.share.world > 1:
        for head in segmenter.heads:
            join_batch_norms(head)
    check_batch_norm(segmenter, processes=runtime.share.world, micro_batches=parts)
    if pooled_over_batch(segmenter) and batch < 2:
        raise DataError(
            "a batch of 1 for UperNet, whose batch norm over a map of one cell needs two images",
            fix="give --batch-size 2 or more, or --head linear",
        )
    return Segmentation(segmenter, auxiliary_weight=config.head.auxiliary_weight)


def fit_segmenter(
    config: SegmentConfig,
    objective: Segmentation,
    data: SegmentationData,
    held: PairSource,
    *,
    runtime: Runtime,
    folder: Path,
    title: str = "segmentation",
) -> tuple[FitResult, Judge]:
    """Train a segmenter by a configuration's recipe; who judged it holds its scores."""
    segmenter = objective.segmenter
    groups = parameter_groups(
        [(f"segmenter.{prefix}", module) for prefix, module in segmenter.trained_parts],
        weight_decay=config.optimizer.weight_decay,
        layer_decay=config.optimizer.layer_decay,
    )
    schedule = schedule_of(
        config.schedule,
        config.optimizer,
        images=len(data.train),
        batch_size=config.data.batch_size,
    )
    average = None if config.ema is None else WeightAverage(segmenter, decay=config.ema)
    judge = Judge(segmenter, config, held, runtime, config.view.short, average)
    result = fit(
        objective,
        adamw(groups, betas=config.optimizer.betas),
        plan_of(config, data.train, crop_of(config, segmenter), schedule, title=title),
        runtime=runtime,
        folder=folder,
        resume=config.run.resume,
        evaluate=judge,
        average=average,
    )
    return result, judge


@dataclass
class Judge:
    """Scores a segmenter, and its averaged weights if there are any; keeps the latest scores."""

    segmenter: Segmenter
    config: SegmentConfig
    held: PairSource
    runtime: Runtime
    short: int
    average: WeightAverage | None = None
    scores: SegmentationScores | None = None
    average_scores: SegmentationScores | None = None

    def __call__(self) -> dict[str, float]:
        """The scores to log: one look at each image."""
        self.scores = latest = self.score(once=True)
        values = {"val_miou": latest.miou, "val_macc": latest.macc, "val_aacc": latest.aacc}
        if self.average is None:
            return values
        with self.average.applied():
            self.average_scores = latest = self.score(once=True)
        return values | {"val_miou_ema": latest.miou}

    def score(self, *, once: bool, quiet: bool = True) -> SegmentationScores:
        """Scores on the held-out part."""
        runtime = self.runtime
        mine = -(-len(self.held) // runtime.share.world)
        with counting("scoring", mine, quiet=quiet or not runtime.first) as progress:
            return score_segmenter(
                self.segmenter,
                self.held,
                short=self.short,
                looks=looks_of(self.config, self.segmenter, once=once),
                workers=self.config.data.workers,
                share=runtime.share,
                total=runtime.sum,
                gather=runtime.gather,
                autocast=runtime.autocast,
                progress=progress,
            )


def _finished(
    config: SegmentConfig,
    judge: Judge,
    prior: PositionPrior,
    folder: Path,
    tuned: FitResult | None,
    data: SegmentationData,
    trained: Trained | None = None,
) -> SegmentResult:
    if judge.scores is None:  # resumed at its end, or only scored
        judge.scores = judge.score(once=True, quiet=False)
    if judge.average is not None and judge.average_scores is None:
        with judge.average.applied():
            judge.average_scores = judge.score(once=True, quiet=False)
    looks = judge.score(once=False, quiet=False) if many_looks(config) else None
    outcome = Outcome(
        config=config,
        segmenter=judge.segmenter,
        data=data,
        held=judge.held,
        prior=prior,
        scores=judge.scores,
        looks=looks,
        average=judge.average,
        average_scores=judge.average_scores,
        fit=tuned,
        trained=trained,
    )
    exported = finish(outcome, folder) if judge.runtime.first else None
    scores = judge.scores
    return SegmentResult(
        folder,
        exported,
        scores.miou,
        scores.macc,
        scores.aacc,
        outcome.prior_scores.miou,
        tuned.step if tuned else 0,
        tuned.seconds if tuned else 0.0,
        tuned.last if tuned else {},
    )


def _score(config: SegmentConfig, data: SegmentationData, held: PairSource) -> SegmentResult:
    """Score a trained segmenter."""
    trained = load_segmenter(config.model.spec)
    segmenter = trained.segmenter
    if segmenter.class_names != data.classes:
        raise DataError(
            f"'{config.model.spec}' knows {len(segmenter.class_names)} classes, which are not the "
            f"{len(data.classes)} of '{data.train.name}'",
            expected="the classes that it was trained on, in the same order",
        )
    runtime = runtime_of(config.run)
    segmenter.to(runtime.device)
    runtime.settle(segmenter)
    looks_of(config, segmenter)
    prior = survey(data, held, quiet=not runtime.first)
    folder = open_run(
        config.run.out,
        config,
        resume=config.run.resume,
        first=runtime.first,
        weights={"model": trained.weights},
    )
    judge = Judge(segmenter, config, held, runtime, short_of(config, trained))
    return _finished(config, judge, prior, folder, None, data, trained)
