"""Segmentation in a comparison: every row's backbone under one recipe of `segment`, by seed."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featdistill.config.commands import CompareConfig, SegmentConfig
from featdistill.config.resolve import resolve
from featdistill.core.errors import ConfigError
from featdistill.core.records import read_record, write_record
from featdistill.data.masks import PairSource
from featdistill.data.segmentation import SegmentationData
from featdistill.engine.runtime import Runtime
from featdistill.engine.tracking import say
from featdistill.evaluation.position_prior import PositionPrior, score_prior
from featdistill.tasks.common import schedule_of
from featdistill.tasks.compare_rows import Row
from featdistill.tasks.segment import fit_segmenter, objective_of
from featdistill.tasks.segment_parts import pairs_of, survey


@dataclass(frozen=True)
class Segmentations:
    """The segmentation part of a comparison, checked before any long work."""

    config: SegmentConfig
    data: SegmentationData
    held: PairSource
    prior: PositionPrior
    runtime: Runtime


def segmentation_config(config: CompareConfig) -> SegmentConfig | None:
    """The configuration of `segment` that a comparison asks for; None if it asks for none.

    Raises:
        ConfigError: a recipe or a value without data, or a recipe of another command.
    """
    asked = config.segment
    given = {
        "batch-size": asked.batch_size,
        "image-size": asked.image_size,
        "head": asked.head,
        "head.layers": asked.layers,
        "steps": asked.steps,
    }
    wanted = {name: value for name, value in given.items() if value is not None}
    if asked.data is None:
        if wanted or asked.recipe is not None:
            raise ConfigError(["--segment-data is required: images and masks for --segment..."])
        return None
    run = {
        "out": config.run.out,
        "device": config.run.device,
        "workers": config.data.workers,
        "run.threads": config.run.threads,
        "run.tensorboard": False,
    }
    found = resolve(
        "segment",
        # the model is each row's own; its name here is never loaded
        {"model": config.student.spec, "data": asked.data, **run, **wanted},
        recipe=asked.recipe,
        origin="--segment",
    )
    assert isinstance(found, SegmentConfig)
    return found


def prepare(config: CompareConfig, rows: Sequence[Row], runtime: Runtime) -> Segmentations | None:
    """Look at the data, and whether every row can be segmented with; None if none is asked for."""
    wanted = segmentation_config(config)
    if wanted is None:
        return None
    data, held = pairs_of(wanted)
    batch = wanted.data.batch_size
    schedule_of(wanted.schedule, wanted.optimizer, images=len(data.train), batch_size=batch)
    for row in rows:
        objective_of(wanted, row.make(config.run.seed), data, runtime)
    prior = survey(data, held, quiet=not runtime.first)
    return Segmentations(wanted, data, held, prior, runtime)


def run_row(
    found: Segmentations, row: Row, *, seeds: Sequence[int], folder: Path
) -> dict[str, Any]:
    """One row's mIoU under every seed: {seed, miou, ...} each, with mean and standard deviation."""
    runs = [{"seed": seed, **_fit(found, row, seed, folder)} for seed in seeds]
    values = [run["miou"] for run in runs]
    spread = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.fmean(values)
    said = "" if spread is None else f" +- {spread:.2%}"
    say(f"{row.title}: mIoU {mean:.2%}{said} over {len(values)} seeds")
    return {"runs": runs, "miou": {"mean": mean, "std": spread, "n": len(values)}}


def about(found: Segmentations) -> dict[str, Any]:
    """What all rows share, for the record."""
    config = found.config
    steps = config.schedule.steps
    return {
        "data": found.held.name,
        "classes": len(found.data.classes),
        "train_images": len(found.data.train),
        "test_images": len(found.held),
        "prior_miou": score_prior(found.prior, found.held).miou,
        "head": config.head.kind,
        "image_size": config.view.size[0],
        "steps": steps,
        "epochs": config.schedule.epochs,
    }


def _fit(found: Segmentations, row: Row, seed: int, whole: Path) -> dict[str, Any]:
    """One training, unless its result is already there."""
    folder = whole / "rows" / row.name / f"segment-seed-{seed}"
    relative = str(folder.relative_to(whole))
    file = folder / "result.json"
    if file.is_file():
        return {**read_record(file, "compare-segment")["results"], "folder": relative}
    folder.mkdir(parents=True, exist_ok=True)
    base = found.config
    # layers without knowledge to keep all learn at the full rate
    decay = 1.0 if row.fresh else base.optimizer.layer_decay
    job = base.model_copy(
        update={
            "run": base.run.model_copy(update={"seed": seed, "resume": True}),
            "optimizer": base.optimizer.model_copy(update={"layer_decay": decay}),
        }
    )
    fit, judge = fit_segmenter(
        job,
        objective_of(job, row.make(seed), found.data, found.runtime),
        found.data,
        found.held,
        runtime=found.runtime,
        folder=folder,
        title=f"{row.title}, segmentation, seed {seed}",
    )
    scores = judge.scores or judge.score(once=True)
    result = {
        "miou": scores.miou,
        "miou_error": scores.miou_error(),
        "aacc": scores.aacc,
        "seconds": fit.seconds,
    }
    if found.runtime.first:
        write_record(
            file,
            "compare-segment",
            config={"row": row.name, "seed": seed},
            results=result,
            arrays={"counts": scores.counts.numpy()},
        )
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    found.runtime.barrier()
    return {**result, "folder": relative}
