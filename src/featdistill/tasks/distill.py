"""`featdistill distill`: a frozen teacher, a fresh student, one loss."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from featdistill.config.commands import DistillConfig
from featdistill.core.records import write_record
from featdistill.core.seeds import SampleStream
from featdistill.data.loader import plainly, training_batches
from featdistill.data.parts import Data
from featdistill.data.views import CropView
from featdistill.engine.loop import check_batch, fit
from featdistill.engine.optimizer import adamw, parameter_groups
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.runtime import Runtime
from featdistill.engine.schedule import Schedule
from featdistill.engine.tracking import duration, say
from featdistill.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from featdistill.models.export import Exported, export_timm
from featdistill.models.load import load_backbone, resize
from featdistill.models.students import PositionName, build_student
from featdistill.models.transfer import continue_from, position_of
from featdistill.objectives.distillation import FeatureDistillation
from featdistill.tasks.common import data_of, plain, plan_of, refuse_labels, runtime_of, schedule_of

PUBLISHED_VIEWS = 384_000_000  # 300 epochs of ImageNet-1K


@dataclass(frozen=True)
class DistillResult:
    """A finished (or stopped) distillation.

    Attributes:
        out: the run's folder.
        export: the timm-loadable student; None if the run stopped early.
        steps: done.
        seconds: of this session.
        last: last logged values: loss, cosine, ...
    """

    out: Path
    export: Path | None
    steps: int
    seconds: float
    last: Mapping[str, float]


@dataclass(frozen=True)
class Assembly:
    """Everything that a distillation needs, built and checked."""

    data: Data
    view: CropView
    objective: FeatureDistillation
    schedule: Schedule
    runtime: Runtime
    notes: tuple[str, ...]


def assemble(config: DistillConfig) -> Assembly:
    """Build teacher, student, objective and data; every mistake comes out here."""
    refuse_labels(config.data)
    data = data_of(config.data, config.run.seed)
    schedule = schedule_of(
        config.schedule,
        config.optimizer,
        images=len(data.train),
        batch_size=config.data.batch_size,
    )
    processes = config.run.devices * config.run.nodes
    check_batch(config.data.batch_size, processes=processes, micro_batches=config.run.micro_batches)
    runtime = runtime_of(config.run)
    teacher = load_backbone(
        config.teacher.spec,
        weights=config.teacher.weights,
        image_size=config.teacher.image_size,
        drop_path=config.teacher.drop_path,
        always_drop_path=config.teacher.drop_path > 0,
        seed=config.run.seed,
    )
    student, notes = _student(config, teacher)
    objective = FeatureDistillation(
        teacher=teacher,
        student=student,
        target=config.objective.target.value,
        whitening=config.objective.whitening.value,
        loss=config.objective.loss.value,
        beta=config.objective.beta,
        layer=config.teacher.layer,
        resample_order=config.objective.resample,
        seed=config.run.seed,
    )
    runtime.choose_attention(student)
    # rendered once at the larger of the two sizes, so that neither model sees enlarged pixels
    side = max(student.image_size[0], teacher.image_size[0])
    view = CropView(side, config.view.crop_scale, config.view.crop_ratio, config.view.flip)
    return Assembly(data, view, objective, schedule, runtime, tuple(notes))


def _student(config: DistillConfig, teacher: Backbone) -> tuple[Backbone, list[str]]:
    wanted = config.student
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    source = None
    if wanted.init == "teacher":
        source = teacher
    elif wanted.init != "random":
        spec, weights = wanted.init, "hub"
        source = load_backbone(spec, weights=weights)
    position: PositionName | None = wanted.position.value if wanted.position else None
    if source is not None:
        mean, std = source.rgb
        if position is None and wanted.name.startswith("vit-"):
            position = position_of(source)
        if source.fixed_size:
            source = resize(source, config.view.image_size)
    student = build_student(
        wanted.name,
        image_size=config.view.image_size,
        patch=wanted.patch,
        position=position,
        drop_path=wanted.drop_path,
        width=wanted.width,
        depth=wanted.depth,
        heads=wanted.heads,
        window=wanted.window,
        init_std=wanted.init_std,
        seed=config.run.seed,
        mean=mean,
        std=std,
    )
    return student, [] if source is None else continue_from(student, source)


def describe(assembly: Assembly) -> list[str]:
    """What will be learned from what, one line each."""
    objective, data = assembly.objective, assembly.data
    teacher, student, pairing = objective.teacher, objective.student, objective.pairing
    lines = [
        f"teacher  {_model(teacher)}",
        f"student  {_model(student)}",
        f"data     {len(data.train):,} images of {data.train.name}",
        f"target   {_target(objective)}",
    ]
    if pairing.left_out and objective.target == "map":
        lines.append(f"no partner, left out: {', '.join(pairing.left_out)}")
    lines += [f"start    {note}" for note in assembly.notes]
    steps = assembly.schedule.steps
    lines.append(f"run      {steps:,} steps on {assembly.runtime.describe()}")
    return lines


def _model(model: Backbone) -> str:
    height, width = model.image_size
    grid = f"{model.grid[0]}x{model.grid[1]}"
    prefix = f" + {'+'.join(model.prefix_names)}" if model.prefix_names else ""
    return (
        f"{model.origin.spec}, {model.origin.weights}: {model.parameters_count / 1e6:.2f} M "
        f"parameters, {height}x{width} pixels, {grid}{prefix} tokens of {model.width}"
    )


def _target(objective: FeatureDistillation) -> str:
    pairing = objective.pairing
    if objective.target != "map":
        return str(objective.target)
    layer = "" if pairing.layer is None else f" of layer {pairing.layer}"
    grids = (
        f"{pairing.teacher_grid[0]}x{pairing.teacher_grid[1]} resampled to "
        f"{pairing.student_grid[0]}x{pairing.student_grid[1]}"
        if pairing.resampled
        else f"{pairing.student_grid[0]}x{pairing.student_grid[1]}"
    )
    prefix = f" and {', '.join(pairing.prefix)}" if pairing.prefix else ""
    return f"map{layer}, {grids}{prefix}"


def budget_warning(images: int, views: float, *, fresh: bool) -> str | None:
    """A plain word where a fresh student cannot see enough to catch up with its teacher."""
    if not fresh or views >= 0.05 * PUBLISHED_VIEWS:
        return None
    return (
        f"note: {views:,.0f} views, {views / PUBLISHED_VIEWS:.2%} of the published "
        f"{PUBLISHED_VIEWS / 1e6:.0f} million. From random weights a student is unlikely to catch "
        f"up with its teacher on {images:,} images: start it from the teacher "
        "(--student-init teacher), add unlabelled images, or train for longer."
    )


def run(config: DistillConfig) -> DistillResult:
    """Distil, and export the student."""
    check_out(config.run.out, resume=config.run.resume)
    assembly = assemble(config)
    folder = open_run(
        config.run.out, config, resume=config.run.resume, first=assembly.runtime.first
    )
    for line in describe(assembly):
        say(line)
    views = assembly.schedule.steps * config.data.batch_size
    fresh = config.student.init == "random"
    if warning := budget_warning(len(assembly.data.train), views, fresh=fresh):
        say(warning)
    objective = assembly.objective
    _calibrate(config, assembly)
    groups = parameter_groups(
        [("student.model.", objective.student.model), ("projector.", objective.projector)],
        weight_decay=config.optimizer.weight_decay,
    )
    plan = plan_of(
        config, assembly.data.train, assembly.view, assembly.schedule, title="distilling"
    )
    result = fit(
        objective,
        adamw(groups, betas=config.optimizer.betas),
        plan,
        runtime=assembly.runtime,
        folder=folder,
        resume=config.run.resume,
    )
    exported = None
    if result.finished and assembly.runtime.first:
        exported = _finish(config, assembly, folder, result.seconds, result.last)
    elif not result.finished:
        say(f"stopped at step {result.step} of {assembly.schedule.steps}; go on with --resume")
    return DistillResult(
        folder,
        exported.folder if exported else None,
        result.step,
        result.seconds,
        result.last,
    )


def _calibrate(config: DistillConfig, assembly: Assembly) -> None:
    """Statistics of the teacher's features, where the whitening wants them."""
    objective, runtime = assembly.objective, assembly.runtime
    objective.to_device(runtime.device)
    size = min(config.data.batch_size, len(assembly.data.train))
    count = max(1, min(config.objective.calibration_images, len(assembly.data.train)) // size)
    loader = training_batches(
        assembly.data.train,
        assembly.view,
        batch_size=size,
        seed=config.run.seed + 1,  # views of its own
        start=0,
        stop=count,
        workers=0,
    )

    batches = (
        runtime.batch(replace(batch, stream=SampleStream(config.run.seed, -1, batch.positions)))
        for batch in itertools.islice(plainly(loader), count)
    )
    with runtime.autocast():
        calibrated = objective.calibrate(batches)
    if calibrated:
        say(f"whitening calibrated on {count * size:,} images")


def _finish(
    config: DistillConfig,
    assembly: Assembly,
    folder: Path,
    seconds: float,
    last: Mapping[str, float],
) -> Exported:
    objective = assembly.objective
    steps = assembly.schedule.steps
    views = steps * config.data.batch_size
    teacher = objective.teacher.origin
    exported = export_timm(
        objective.student,
        folder / "export",
        card={
            "method": "feature distillation (arXiv 2205.14141)",
            "teacher": f"{teacher.spec} ({teacher.weights}; "
            f"licence: {teacher.licence or 'unknown'})",
            "data": f"{len(assembly.data.train):,} images of {Path(config.data.path).name}",
            "views": f"{views:,} in {steps:,} steps",
            "target": f"{config.objective.target.value}, {config.objective.whitening.value}, "
            f"{config.objective.loss.value}",
        },
    )
    write_record(
        folder / "distill.json",
        "distill",
        config=plain(config),
        results={
            "steps": steps,
            "images_seen": views,
            "seconds": seconds,
            "pairing": asdict(objective.pairing),
            "last": dict(last),
            "notes": list(assembly.notes),
            "teacher": asdict(teacher),
        },
    )
    say(
        f"done in {duration(seconds)}; the student, for plain timm (checked to "
        f"{exported.difference:.0e}):\n"
    )
    say(exported.snippet)
    weights = config.teacher.weights
    out = config.run.out.rstrip("/")
    words = [
        *("featdistill", "compare", "--teacher", config.teacher.spec),
        *(() if weights == "hub" else ("--teacher-weights", weights)),
        *("--student", out, "--data", config.data.path),
        *("--image-size", str(config.view.image_size), "--out", f"{out}-compared"),
    ]
    say(f"\nnext: {shlex.join(words)}")
    return exported
