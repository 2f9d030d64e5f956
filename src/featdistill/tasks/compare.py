"""`featdistill compare`: is the distilled model better for you than what you had?

Teacher, student, any further models and (if wanted) the student's shape from nothing are
fine-tuned by one recipe, on the same labels, under the same seeds. Each row's learning rate is
chosen on a part of the training labels, never on the images that are scored.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.config.commands import CompareConfig
from featdistill.core.errors import ConfigError
from featdistill.core.records import write_record
from featdistill.data.loader import steps_per_epoch
from featdistill.data.sources import Source
from featdistill.data.splits import label_budget, split
from featdistill.engine.batches import check_batch
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.tracking import console, duration, say
from featdistill.evaluation.paired import LEVEL, RESAMPLES, Hits, Paired, paired, verdict
from featdistill.models.backbone import Backbone
from featdistill.models.weights import tensors_hash
from featdistill.tasks import compare_segmentation
from featdistill.tasks.caches import kept_images
from featdistill.tasks.common import data_of, plain, runtime_of, schedule_of
from featdistill.tasks.compare_fits import (
    Progress,
    Setting,
    cost_of,
    fit_once,
    layer_decay,
    sweep,
)
from featdistill.tasks.compare_rows import Row, keep_inputs, own_size, rows_of, weights_of
from featdistill.tasks.finetune import check_labels, classification
from featdistill.tasks.knn import knn_of

# rows and seeds are each done by themselves, so a finished comparison may get more of them
_MAY_CHANGE = frozenset(("also", "scratch", "seeds"))


@dataclass(frozen=True)
class CompareResult:
    """The answer.

    Attributes:
        results: what `compare.json` holds under `results`.
        verdict: it in a sentence.
        record, report: the files.
    """

    results: Mapping[str, Any]
    verdict: str
    record: Path
    report: Path


@dataclass(frozen=True)
class _Done:
    """A row with its scores.

    Attributes:
        record: as `compare.json` has it.
        hits: (seeds, held-out images) what was classified rightly.
    """

    record: dict[str, Any]
    hits: Hits


def run(config: CompareConfig) -> CompareResult:
    """Fine-tune every row under every seed, score, and write the record and the page."""
    began = time.monotonic()
    setting, rows, size, segmentation = _prepare(config)
    say(
        f"{len(rows)} models x ({len(config.lrs) if len(config.lrs) > 1 else 0} learning rates + "
        f"{len(config.seeds)} seeds) = {setting.progress.fits} fine-tunings on "
        f"{setting.runtime.describe()}"
    )
    with setting.progress.interruptible():
        done = [_row(setting, row, f"{n} of {len(rows)} models") for n, row in enumerate(rows, 1)]
        if segmentation is not None:
            for model, one in zip(rows, done, strict=True):
                one.record["segmentation"] = compare_segmentation.run_row(
                    segmentation, model, seeds=config.seeds, folder=setting.folder
                )
    pairs = _pairs(config, {one.record["name"]: one.hits for one in done})
    for row in (one.record for one in done):
        if warning := _edge(row):
            say(warning)
    results: dict[str, Any] = {
        "data": {
            "name": setting.train.name,
            "train_images": len(setting.train),
            "labels": config.data.labels,
            "labelled_images": len(setting.labels(config.seeds[0])),
            "test_images": len(setting.held),
            "classes": len(setting.classes),
        },
        "recipe": _recipe(setting, size),
        "rows": [one.record for one in done],
        "segmentation": None if segmentation is None else compare_segmentation.about(segmentation),
        "differences": [_difference(of, minus, pair) for (of, minus), pair in pairs.items()],
        "verdict": verdict(pairs["student", "teacher"]),
        "seconds": time.monotonic() - began,
    }
    file = setting.folder / "compare.json"
    if not setting.runtime.first:
        page = setting.folder / "report" / "index.html"
        return CompareResult(results, results["verdict"], file, page)
    return _report(write_record(file, "compare", config=plain(config), results=results), results)


def _prepare(
    config: CompareConfig,
) -> tuple[Setting, list[Row], int, compare_segmentation.Segmentations | None]:
    """Everything that may be wrong, before any long work; and the run's folder."""
    check_out(config.run.out, resume=config.run.resume)
    data = data_of(config.data, config.run.seed)
    train, held, classes = check_labels(data, budget=None, seed=config.run.seed)
    _check_sizes(config, train)
    runtime = runtime_of(config.run)
    size = config.view.image_size or own_size(config)
    rows = rows_of(config, size)
    for row in rows:  # whether its features suit the classifier
        classification(row.make(config.run.seed), config, classes=classes, runtime=runtime)
    segmentation = compare_segmentation.prepare(config, rows, runtime)
    train, held = kept_images(config.data, train, held, runtime=runtime)
    folder = open_run(
        config.run.out,
        config,
        resume=config.run.resume,
        first=runtime.first,
        weights=weights_of(rows),
        may_change=_MAY_CHANGE,
    )
    if runtime.first:
        keep_inputs(config, folder)
    sweeps = len(config.lrs) if len(config.lrs) > 1 else 0
    progress = Progress(len(rows) * (sweeps + len(config.seeds)))
    setting = Setting(config, train, held, classes, runtime, folder, progress)
    return setting, rows, size, segmentation


def _report(record: Path, results: Mapping[str, Any]) -> CompareResult:
    from featdistill.report.costs import cost_table
    from featdistill.report.page import write_report
    from featdistill.report.tables import comparison_table

    page = write_report(record.parent)
    console.print(comparison_table(results))
    if (costs := cost_table(results)) is not None:
        console.print(costs)
    say(f"\n{results['verdict']}")
    say(f"in {duration(results['seconds'])}; report: {page}")
    return CompareResult(results, results["verdict"], record, page)


def _check_sizes(config: CompareConfig, train: Source) -> None:
    """Refuse what cannot be, before any model is loaded."""
    if config.schedule.stop_at is not None:
        raise ConfigError(["--schedule.stop_at is not for compare, which resumes by itself"])
    budget = config.data.labels
    smallest = train if budget is None else label_budget(train, budget, config.run.seed)
    if len(config.lrs) > 1:
        smallest, _ = split(smallest, config.sweep_fraction, config.run.seed)
    steps_per_epoch(len(smallest), config.data.batch_size)
    mixes = config.mix.probability > 0 and (config.mix.mixup > 0 or config.mix.cutmix > 0)
    check_batch(
        config.data.batch_size,
        processes=config.run.devices * config.run.nodes,
        micro_batches=config.run.micro_batches,
        even=mixes,
    )


def _row(setting: Setting, row: Row, place: str) -> _Done:
    config = setting.config
    tried = sweep(setting, row)
    factor = tried.best() if tried.trials else config.lrs[0]
    fits = [
        fit_once(
            setting,
            row,
            f"seed-{seed}",
            seed=seed,
            factor=factor,
            train=setting.labels(seed),
            held=setting.held,
        )
        for seed in config.seeds
    ]
    model = row.make(config.seeds[0])
    about = _model(model, row)
    scores = _knn(setting, row, model)
    values = [fit.results["top1"] for fit in fits]
    spread = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.fmean(values)
    say(
        f"{row.title}: top-1 {mean:.2%}"
        + (f" +- {spread:.2%}" if spread is not None else "")
        + f" over {len(values)} seeds, learning rate {setting.rate(factor):.2g}"
        + (f", kNN {max(scores.values()):.2%}" if scores else "")
        + f" ({place} done{setting.progress.left()})"
    )
    record = {
        "name": row.name,
        "title": row.title,
        "model": about,
        "sweep": tried.trials,
        "lr": setting.rate(factor),
        "at_edge": tried.beyond() is not None if tried.trials else False,
        "layer_decay": layer_decay(config, row),
        "runs": [
            {"seed": seed, **fit.results} for seed, fit in zip(config.seeds, fits, strict=True)
        ],
        "top1": {"mean": mean, "std": spread, "n": len(values)},
        "knn": scores,
        "cost": {
            "made": [asdict(stage) for stage in row.past.stages],
            "unknown": list(row.past.unknown),
            "finetuning": cost_of([*tried.fits, *fits], tried.lost),
        },
    }
    return _Done(record, np.stack([fit.hits for fit in fits]))


def _model(model: Backbone, row: Row) -> dict[str, Any]:
    return {
        "spec": model.origin.spec,
        "architecture": model.build.architecture if model.build else type(model.model).__name__,
        "parameters": model.parameters_count,
        "image_size": model.image_size[0],
        "width": model.width,
        "grid": list(model.grid),
        "weights": "random, by seed" if row.fresh else model.origin.weights,
        "sha256": tensors_hash(model.model),
    }


def _edge(row: Mapping[str, Any]) -> str | None:
    """A warning if a better learning rate may lie outside of those tried."""
    if not row["at_edge"]:
        return None
    return (
        f"warning: {row['title']} did best at the outermost learning rate tried, {row['lr']:.2g}; "
        "a better one may lie beyond: repeat with more values for --lrs, or a larger --extend-lrs"
    )


def _pairs(config: CompareConfig, hits: Mapping[str, Hits]) -> dict[tuple[str, str], Paired]:
    """Every row against the teacher, the student first; and the student against its fresh self."""
    against = [("student", "teacher")]
    against += [(name, "teacher") for name in hits if name not in ("teacher", "student")]
    if "scratch" in hits:
        against.append(("student", "scratch"))
    return {
        (of, minus): paired(hits[of], hits[minus], seed=config.run.seed) for of, minus in against
    }


def _difference(of: str, minus: str, pair: Paired) -> dict[str, Any]:
    return {
        "of": of,
        "minus": minus,
        "per_seed": list(pair.per_seed),
        "mean": pair.mean,
        "std": pair.std,
        "n": len(pair.per_seed),
        "interval": None if pair.interval is None else list(pair.interval),
        "images_interval": list(pair.images),
        "level": LEVEL,
        "resamples": RESAMPLES,
    }


def _knn(setting: Setting, row: Row, model: Backbone) -> dict[str, float] | None:
    """kNN accuracy by k, as text keys; None for a model that has learnt nothing."""
    config = setting.config
    if config.knn is None or row.fresh:
        return None
    model.to(setting.runtime.device)
    found = knn_of(
        model,
        config.knn,
        train=setting.labels(config.run.seed),
        held=setting.held,
        batch_size=max(1, min(1024, config.data.batch_size)),
        crop=config.view.eval_crop,
        workers=config.data.workers,
    )
    return {str(k): v for k, v in found.items()}


def _recipe(setting: Setting, size: int) -> dict[str, Any]:
    config = setting.config
    images = len(setting.labels(config.seeds[0]))
    batch = config.data.batch_size
    steps = schedule_of(config.schedule, config.optimizer, images=images, batch_size=batch).steps
    return {
        "steps": steps,
        "epochs": steps / steps_per_epoch(images, batch),
        "batch_size": batch,
        "image_size": size,
        "layer_decay": config.optimizer.layer_decay,
        "lr": setting.rate(1.0),
    }
