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
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.tracking import duration, say
from featdistill.models.export import export_timm
from featdistill.models.students import build_student
from featdistill.objectives.contrastive import SimCLR
from featdistill.tasks.common import data_of, plain, plan_of, refuse_labels, runtime_of, schedule_of


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
    model, view = config.model, config.view
    backbone = build_student(
        model.name,
        image_size=view.image_size,
        patch=model.patch,
        style="plain",
        drop_path=model.drop_path,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        window=model.window,
        seed=config.run.seed,
    )
    objective = SimCLR(
        backbone,
        temperature=config.objective.temperature,
        hidden=config.objective.hidden,
        projection=config.objective.projection,
        seed=config.run.seed,
    )
    runtime.choose_attention(backbone)
    folder = open_run(config.run.out, config, resume=config.run.resume, first=runtime.first)
    say(
        f"model  {model.name}, {backbone.parameters_count / 1e6:.2f} M parameters, "
        f"{view.image_size} pixels\n"
        f"data   {len(data.train):,} images of {data.train.name}\n"
        f"run    {schedule.steps:,} steps on {runtime.describe()}"
    )
    plan = plan_of(
        config,
        data.train,
        ContrastiveView(
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
        ),
        schedule,
        title="pre-training",
    )
    groups = parameter_groups(
        [("backbone.model.", backbone.model), ("head.", objective.head)],
        weight_decay=config.optimizer.weight_decay,
    )
    result = fit(
        objective,
        adamw(groups, betas=config.optimizer.betas),
        plan,
        runtime=runtime,
        folder=folder.path,
        resume=config.run.resume,
    )
    if not result.finished:
        say(f"stopped at step {result.step} of {schedule.steps}; go on with --resume")
        return PretrainResult(folder.path, None, result.step, result.seconds, result.last)
    exported = export_timm(
        backbone,
        folder.path / "export",
        card={
            "method": "SimCLR (arXiv 2002.05709)",
            "data": f"{len(data.train):,} images of {Path(config.data.path).name}",
            "views": f"{2 * result.step * config.data.batch_size:,} in {result.step:,} steps",
        },
    )
    write_record(
        folder.path / "pretrain.json",
        "pretrain",
        config=plain(config),
        results={
            "steps": result.step,
            "images_seen": result.step * config.data.batch_size,
            "seconds": result.seconds,
            "last": dict(result.last),
            "notes": [],
        },
    )
    say(f"done in {duration(result.seconds)}; the model, for plain timm:\n")
    say(exported.snippet)
    out = config.run.out.rstrip("/")
    sizes = model.model_dump(include={"patch", "width", "depth", "heads", "window"})
    words = [
        *("featdistill", "distill", "--teacher", out, "--student", model.name),
        *(w for k, v in sizes.items() if v is not None for w in (f"--student.{k}", str(v))),
        *("--student-init", "teacher", "--data", config.data.path),
        *("--image-size", str(view.image_size), "--out", f"{out}-distilled"),
    ]
    say(f"\nnext: {shlex.join(words)}")
    return PretrainResult(folder.path, exported.folder, result.step, result.seconds, result.last)
