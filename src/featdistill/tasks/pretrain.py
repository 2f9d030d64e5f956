"""`featdistill pretrain`: a contrastive teacher (SimCLR) where none can be downloaded."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from featdistill.config.commands import PretrainConfig
from featdistill.core.errors import ConfigError
from featdistill.core.records import write_record
from featdistill.data.views import ContrastiveView
from featdistill.engine.loop import fit
from featdistill.engine.optimizer import adamw, parameter_groups
from featdistill.engine.plan import FitResult
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.tracking import duration, say
from featdistill.models.export import export_timm
from featdistill.models.exports.card import FRESH, public_name
from featdistill.models.students import build_student
from featdistill.objectives.contrastive import SimCLR
from featdistill.tasks.caches import kept_images
from featdistill.tasks.common import (
    data_of,
    plain,
    plan_of,
    refuse_labels,
    runtime_of,
    schedule_of,
    settle,
)


@dataclass(frozen=True)
class PretrainResult:
    """A finished (or stopped) pre-training; `export` is None if it stopped early."""

    out: Path
    export: Path | None
    steps: int
    seconds: float
    last: Mapping[str, float]


def run(config: PretrainConfig) -> PretrainResult:
    """Pre-train, and export the backbone."""
    if config.run.micro_batches > 1 or config.run.devices * config.run.nodes > 1:
        raise ConfigError(
            ["pretrain takes one process and one micro-batch: its negatives are the batch's own"]
        )
    check_out(config.run.out, resume=config.run.resume)
    refuse_labels(config.data)
    data = data_of(config.data, config.run.seed)
    schedule = schedule_of(
        config.schedule,
        config.optimizer,
        images=len(data.train),
        batch_size=config.data.batch_size,
    )
    runtime = runtime_of(config.run)
    objective = _objective(config)
    settle(runtime, objective.backbone, config.run)
    [train] = kept_images(config.data, data.train, runtime=runtime)
    folder = open_run(
        config.run.out,
        config,
        resume=config.run.resume,
        first=runtime.first,
        steps=schedule.steps,
    )
    say(
        f"model  {config.model.name}, {objective.backbone.parameters_count / 1e6:.2f} M "
        f"parameters, {config.view.image_size} pixels\n"
        f"data   {len(data.train):,} images of {data.train.name}\n"
        f"run    {schedule.steps:,} steps on {runtime.describe()}"
    )
    groups = parameter_groups(
        [("backbone.model.", objective.backbone.model), ("head.", objective.head)],
        weight_decay=config.optimizer.weight_decay,
    )
    result = fit(
        objective,
        adamw(groups, betas=config.optimizer.betas),
        plan_of(config, train, _view(config), schedule, title="pre-training"),
        runtime=runtime,
        folder=folder,
        resume=config.run.resume,
    )
    if not result.finished:
        say(f"stopped at step {result.step} of {schedule.steps}; go on with --resume")
        return PretrainResult(folder, None, result.step, result.seconds, result.last)
    export = _finish(config, objective, len(data.train), folder, result)
    return PretrainResult(folder, export, result.step, result.seconds, result.last)


def _objective(config: PretrainConfig) -> SimCLR:
    model = config.model
    backbone = build_student(
        model.name,
        image_size=config.view.image_size,
        patch=model.patch,
        drop_path=model.drop_path,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        window=model.window,
        style="plain",
        seed=config.run.seed,
    )
    return SimCLR(
        backbone,
        temperature=config.objective.temperature,
        hidden=config.objective.hidden,
        projection=config.objective.projection,
        seed=config.run.seed,
    )


def _view(config: PretrainConfig) -> ContrastiveView:
    view = config.view
    return ContrastiveView(
        size=view.image_size,
        scale=view.crop_scale,
        ratio=view.crop_ratio,
        flip=view.flip,
        rotate=view.rotate,
        brightness=view.brightness,
        contrast=view.contrast,
        saturation=view.saturation,
        hue=view.hue,
        gray=view.gray,
        blur=view.blur,
    )


def _finish(
    config: PretrainConfig, objective: SimCLR, images: int, folder: Path, result: FitResult
) -> Path:
    """Export the backbone, write the record, and say what to do next."""
    exported = export_timm(
        objective.backbone,
        folder / "export",
        card={
            "method": "SimCLR (arXiv 2002.05709)",
            "data": f"{images:,} images of {Path(config.data.path).name}",
            "views": f"{2 * result.step * config.data.batch_size:,} in {result.step:,} steps",
        },
        licences={public_name(config.run.out): FRESH},
    )
    write_record(
        folder / "pretrain.json",
        "pretrain",
        config=plain(config),
        results={
            "steps": result.step,
            "images_seen": result.step * config.data.batch_size,
            "seconds": result.seconds,
            "joules": result.joules,
            "schedules": result.schedules,
            "last": dict(result.last),
            "notes": [],
        },
    )
    say(f"done in {duration(result.seconds)}; the model, for plain timm:\n")
    say(exported.snippet)
    out = config.run.out.rstrip("/")
    sizes = config.model.model_dump(include={"patch", "width", "depth", "heads", "window"})
    words = [
        *("featdistill", "distill", "--teacher", out, "--student", config.model.name),
        *(w for k, v in sizes.items() if v is not None for w in (f"--student.{k}", str(v))),
        *("--student-init", "teacher", "--data", config.data.path),
        *("--image-size", str(config.view.image_size), "--out", f"{out}-distilled"),
    ]
    say(f"\nnext: {shlex.join(words)}")
    return exported.folder
