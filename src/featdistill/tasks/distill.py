"""`featdistill distill`: a frozen teacher, a fresh student, one loss."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.text import Text

from featdistill.config.commands import DistillConfig
from featdistill.core.records import write_record
from featdistill.core.seeds import SampleStream
from featdistill.data.holdout import without
from featdistill.data.loader import plainly, training_batches
from featdistill.engine.best import read_best
from featdistill.engine.loop import fit
from featdistill.engine.plan import FitResult, Plan
from featdistill.engine.quarantine import Quarantine
from featdistill.engine.rundir import check_out, open_run, read_metrics
from featdistill.engine.tracking import console, duration, log, say
from featdistill.models.backbone import Origin
from featdistill.models.export import Exported, export_timm
from featdistill.models.exports.card import public_name
from featdistill.tasks.assembly import Assembly, assemble, optimizer_of
from featdistill.tasks.caches import kept_images
from featdistill.tasks.common import plain, plan_of
from featdistill.tasks.describe import describe, shapes, width_of
from featdistill.tasks.preflight import preflight
from featdistill.tasks.provenance import licences_of, origin_record
from featdistill.tasks.signal import Signal
from featdistill.tasks.teacher_cache import TeacherPass


@dataclass(frozen=True)
class DistillResult:
    """A finished (or stopped) distillation.

    Attributes:
        out: the run's folder.
        export: the timm-loadable student; None if the run stopped early.
        steps: done.
        seconds: of all its sessions.
        last: last logged values: loss, cosine, ...
        students: of several, each one's result by its folder's name; `export` and `last` are
            theirs alone.
    """

    out: Path
    export: Path | None
    steps: int
    seconds: float
    last: Mapping[str, float]
    students: Mapping[str, DistillResult] = field(default_factory=dict)


def run(config: DistillConfig) -> DistillResult:
    """Distil, and export the student."""
    if len(config.student.names) > 1:
        from featdistill.tasks.distill_several import run_several

        return run_several(config)
    check_out(config.run.out, resume=config.run.resume)
    [assembly] = with_cache(config, [assemble(config)])
    lines = announce(config, assembly)
    folder = open_run(
        config.run.out,
        config,
        resume=config.run.resume,
        first=assembly.runtime.first,
        weights=assembly.weights,
        steps=assembly.schedule.steps,
    )
    log.info("\n".join(lines))
    objective = assembly.objective
    plan = plan_to_distill(config, assembly, teach(config, [assembly], folder))
    signal = Signal(config, assembly, plan, folder)
    result = fit(
        objective,
        optimizer_of(config, objective),
        plan,
        runtime=assembly.runtime,
        folder=folder,
        resume=config.run.resume,
        evaluate=signal if signal.wanted else None,
    )
    exported = None
    if result.finished and assembly.runtime.first:
        exported = _finish(config, assembly, folder, result)
    elif not result.finished:
        say(f"stopped at step {result.step} of {assembly.schedule.steps}; go on with --resume")
    return DistillResult(
        folder,
        exported.folder if exported else None,
        result.step,
        result.seconds,
        result.last,
    )


def with_cache(config: DistillConfig, assemblies: Sequence[Assembly]) -> list[Assembly]:
    """Assemblies that share their images, with those where they are to be kept."""
    first = assemblies[0]
    train, *scored = kept_images(
        config.data,
        first.data.train,
        *(() if first.held.images is None else (first.held.images,)),
        runtime=first.runtime,
    )
    held = replace(first.held, train=train, images=scored[0] if scored else None)
    data = without(first.data, held)
    return [replace(assembly, data=data, held=held) for assembly in assemblies]


def plan_to_distill(config: DistillConfig, assembly: Assembly, taught: TeacherPass | None) -> Plan:
    """The loop's plan.

    Args:
        taught: of `teach`.
    """
    return replace(
        plan_of(config, assembly.data.train, assembly.view, assembly.schedule, title="distilling"),
        eval_first=True,
        best=assembly.best,
        cache=taught.cache if taught else None,
        complete=taught.complete if taught else None,
    )


def announce(
    config: DistillConfig, assembly: Assembly, others: Sequence[Assembly] = ()
) -> list[str]:
    """Say what will be done, and what it will cost; before the run's folder is made.

    Returns:
        The lines, which the run's log wants too.
    """
    lines = []

    def show(more: list[str]) -> None:
        lines.extend(more)
        for line in more:
            console.print(Text(line))

    width = width_of(console)
    table = shapes(assembly, *others)
    show(describe(config, assembly, table, others=others, width=width))
    if config.run.preflight and not config.run.resume:
        cost = preflight(config, assembly, others=others)
        show(["", *cost.lines(config.data.batch_size, width)])
    show([""])
    return lines


def teach(
    config: DistillConfig, assemblies: Sequence[Assembly], folder: Path
) -> TeacherPass | None:
    """All that the teacher has to do before the first step; what mends its cache, if it has one."""
    assembly, taught = assemblies[0], None
    kept, source = assembly.kept, assembly.data.train
    if kept is not None:
        taught = TeacherPass(
            kept.cache,
            assembly.objective,
            source=source,
            view=assembly.view,
            batch_size=config.data.batch_size,
            runtime=assembly.runtime,
            quarantine=lambda: Quarantine(
                folder / "quarantine.jsonl", images=len(source), limit=config.data.tolerated
            ),
            workers=config.data.workers,
        )
        taught.fill(kept.need.views)
    for each in assemblies:
        _calibrate(config, each)
        if taught is not None:
            each.objective.rest()
    return taught


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


def _init_record(config: DistillConfig, assembly: Assembly) -> dict[str, str | None] | None:
    """The weights that the student continued from; None for fresh ones."""
    if config.student.init == "random":
        return None
    if config.student.init == "teacher":
        return origin_record(assembly.objective.teacher.origin)
    return origin_record(Origin(config.student.init, assembly.weights["student"]))


def _continued(config: DistillConfig, assembly: Assembly) -> dict[str, str]:
    """The card's line about the weights that the student continued from."""
    source = _init_record(config, assembly)
    if source is None:
        return {}
    return {"continued from": f"{public_name(source['spec'] or '')} ({source['weights']})"}


def _finish(
    config: DistillConfig,
    assembly: Assembly,
    folder: Path,
    result: FitResult,
) -> Exported:
    """Export the student, and the best one too if one was kept; say what to do next."""
    exported = keep(config, assembly, folder, result)
    say(
        f"done in {duration(result.seconds)}; the student, for plain timm (checked to "
        f"{exported.difference:.0e}):\n"
    )
    say(exported.snippet)
    keep_best(config, assembly, folder, result)
    say_next(config, [config.run.out.rstrip("/")])
    return exported


def say_next(config: DistillConfig, students: Sequence[str]) -> None:
    """The command that tells whether it was worth it."""
    weights, out = config.teacher.weights, config.run.out.rstrip("/")
    words = [
        *("featdistill", "compare", "--teacher", config.teacher.spec),
        *(() if weights == "hub" else ("--teacher-weights", weights)),
        *("--student", students[0]),
        *(word for other in students[1:] for word in ("--also", other)),
        *("--data", config.data.path),
        *("--image-size", str(config.view.image_size), "--out", f"{out}-compared"),
    ]
    say(f"\nnext: {shlex.join(words)}")


def keep(config: DistillConfig, assembly: Assembly, folder: Path, result: FitResult) -> Exported:
    """Write the export and the record of the student as it is."""
    step = assembly.schedule.steps
    return _keep(config, assembly, folder, result, step=step, last=result.last)


def _repeated(assembly: Assembly) -> str:
    """The card's words about views that repeat."""
    kept = assembly.kept
    return "" if kept is None else f", {kept.need.views} fixed views of each image"


def _keep(
    config: DistillConfig,
    assembly: Assembly,
    folder: Path,
    result: FitResult,
    *,
    step: int,
    last: Mapping[str, float],
    chosen: str | None = None,
) -> Exported:
    """Write the export and the record of the student as it was after a step.

    Args:
        result: of the whole run.
        last: the newest values logged by then.
        chosen: by which score this step was chosen; None: it is the last.
    """
    objective, teacher = assembly.objective, assembly.objective.teacher.origin
    views = step * config.data.batch_size
    befores = [(config.teacher.spec, origin_record(teacher))]
    if config.student.init != "teacher" and (source := _init_record(config, assembly)):
        befores.append((config.student.init, source))
    exported = export_timm(
        objective.student,
        folder / "export",
        card={
            "method": "feature distillation (arXiv 2205.14141)",
            "teacher": f"{public_name(teacher.spec)} ({teacher.weights}; "
            f"licence: {teacher.licence or 'unknown'})",
            **_continued(config, assembly),
            "data": f"{len(assembly.data.train):,} images of {Path(config.data.path).name}",
            "views": f"{views:,} in {step:,} steps{_repeated(assembly)}",
            **({"chosen by": chosen} if chosen else {}),
            "target": f"{config.objective.target.value}, {config.objective.whitening.value}, "
            f"{config.objective.loss.value}",
        },
        licences=licences_of(befores),
    )
    write_record(
        folder / "distill.json",
        "distill",
        config=plain(config),
        results={
            "steps": step,
            "images_seen": views,
            "seconds": result.seconds,
            "joules": result.joules,
            "schedules": result.schedules,
            "pairing": asdict(objective.pairing),
            "last": dict(last),
            "notes": list(assembly.notes),
            "held_out": assembly.held.describe(),
            "chosen_by": chosen,
            "teacher": asdict(teacher),
            "student_init": _init_record(config, assembly),
            **({"together_with": list(assembly.others)} if assembly.others else {}),
        },
    )
    return exported


def keep_best(config: DistillConfig, assembly: Assembly, folder: Path, result: FitResult) -> None:
    """The best student as a small run folder, `best/`; the objective then holds that one."""
    best = read_best(folder / "checkpoints" / "best") if assembly.best else None
    if best is None:
        return
    metric, value = best.manifest["metric"], best.manifest["value"]
    values: dict[str, float] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        if row["step"] <= best.step:
            values |= row
    values.pop("step", None)
    assembly.objective.load_state_dict(dict(best.files["model"]))
    chosen = f"{metric} {value:.4g}, {best.manifest['mode']} of the run"
    _keep(
        config,
        assembly,
        folder / "best",
        result,
        step=best.step,
        last=values,
        chosen=chosen,
    )
    say(f"\nthe best student by {metric} ({value:.4g}, step {best.step:,}): {folder / 'best'}")
