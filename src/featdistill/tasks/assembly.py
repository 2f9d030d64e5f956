"""Everything that a distillation needs, built and checked before any long work."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from featdistill.config.commands import DistillConfig
from featdistill.config.sections import Precision
from featdistill.core.errors import ModelError
from featdistill.data.holdout import HeldOut, without
from featdistill.data.parts import Data
from featdistill.data.views import CropView
from featdistill.engine.batches import check_batch
from featdistill.engine.best import Choice
from featdistill.engine.optimizer import adamw, parameter_groups
from featdistill.engine.runtime import Runtime
from featdistill.engine.schedule import Schedule
from featdistill.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from featdistill.models.droppath import skip_dropped
from featdistill.models.load import load_backbone
from featdistill.models.lowered import lay_out_convolutions
from featdistill.models.resize import resize
from featdistill.models.students import PositionName, build_student
from featdistill.models.transfer import continue_from, position_of
from featdistill.objectives.distillation import FeatureDistillation
from featdistill.tasks.common import (
    data_of,
    model_of,
    refuse_labels,
    runtime_of,
    schedule_of,
    settle,
)
from featdistill.tasks.signal_data import Voters, choice_of, held_out_of, voters_of
from featdistill.tasks.teacher_cache import Kept, kept_of


@dataclass(frozen=True)
class Assembly:
    """Everything that a distillation needs, built and checked.

    Attributes:
        name: the student's, among `others` that learn from the same pass of the teacher.
    """

    name: str
    others: tuple[str, ...]
    data: Data
    view: CropView
    objective: FeatureDistillation
    schedule: Schedule
    runtime: Runtime
    notes: tuple[str, ...]
    weights: Mapping[str, str]
    held: HeldOut
    voters: Voters | None
    best: Choice | None
    kept: Kept | None


def students_of(config: DistillConfig) -> dict[str, DistillConfig]:
    """Each student's own configuration, by the name of its folder (of one: the run's own)."""
    names = config.student.names
    if len(names) == 1:
        return {"student": config}
    found: dict[str, DistillConfig] = {}
    for spec in names:
        base = re.sub(r"[^\w.-]+", "-", spec.removeprefix("timm/")).strip("-.") or "student"
        free = (base if n == 1 else f"{base}-{n}" for n in itertools.count(1))
        name = next(name for name in free if name not in found)
        out = str(Path(config.run.out) / name) if config.run.out else ""
        found[name] = config.model_copy(
            update={
                "student": config.student.model_copy(update={"name": spec}),
                "run": config.run.model_copy(update={"out": out}),
            }
        )
    return found


def assemble(config: DistillConfig) -> Assembly:
    """Build teacher, student, objective and data; every mistake comes out here."""
    [assembly] = assemble_all({"student": config})
    return assembly


def assemble_all(students: Mapping[str, DistillConfig]) -> list[Assembly]:
    """Likewise for several students of one teacher, which share all but themselves.

    Args:
        students: of `students_of`.
    """
    config = next(iter(students.values()))
    refuse_labels(config.data)
    data = data_of(config.data, config.run.seed)
    held = held_out_of(config, data)
    data = without(data, held)
    schedule = schedule_of(
        config.schedule,
        config.optimizer,
        images=len(data.train),
        batch_size=config.data.batch_size,
    )
    voters = voters_of(config)
    best = choice_of(config, held)
    processes = config.run.devices * config.run.nodes
    check_batch(config.data.batch_size, processes=processes, micro_batches=config.run.micro_batches)
    runtime = runtime_of(config.run)
    teacher = teacher_of(config)
    made = {name: _taught_by(teacher, mine) for name, mine in students.items()}
    objectives = {name: objective for name, (objective, _, _) in made.items()}
    _suit(config, runtime, list(objectives.values()))
    # rendered once at the largest size, so that no model sees enlarged pixels
    sizes = [teacher, *(o.student for o in objectives.values())]
    side = max(model.image_size[0] for model in sizes)
    view = CropView(side, config.view.crop_scale, config.view.crop_ratio, config.view.flip)
    _check_layers(config, objectives)
    first = next(iter(objectives.values()))
    kept = kept_of(config, first, data.train, view, schedule, runtime)
    return [
        Assembly(
            name=name,
            others=tuple(other for other in students if other != name),
            data=data,
            view=view,
            objective=objective,
            schedule=schedule,
            runtime=runtime,
            notes=tuple(notes),
            weights=_weights(teacher, source),
            held=held,
            voters=voters,
            best=best,
            kept=kept,
        )
        for name, (objective, source, notes) in made.items()
    ]


def _suit(
    config: DistillConfig, runtime: Runtime, objectives: Sequence[FeatureDistillation]
) -> None:
    """Suit all models to the device, and to what the run asks for."""
    for objective in objectives:
        settle(runtime, objective.student, config.run)
        if config.student.drop_path_way == "skip":
            skip_dropped(objective.student.model, objective.student.slot)
    teacher = objectives[0].teacher
    runtime.suit(teacher)
    lay_out_convolutions(teacher.model)
    precision = _teacher_precision(config, runtime, teacher)
    for objective in objectives:
        objective.teacher_precision = precision


def _teacher_precision(
    config: DistillConfig, runtime: Runtime, teacher: Backbone
) -> Literal["float32", "bf16"] | None:
    """Of the teacher's pass; None: the run's."""
    match config.teacher.precision:
        case Precision.BF16:
            return "bf16"
        case Precision.FLOAT32:
            return "float32"
        case Precision.AUTO:
            return "bf16" if runtime.pays(teacher) else None


def _weights(teacher: Backbone, source: Backbone | None) -> dict[str, str]:
    weights = {"teacher": teacher.origin.weights}
    if source is not None and source is not teacher:
        weights["student"] = source.origin.weights
    return weights


def _check_layers(config: DistillConfig, objectives: Mapping[str, FeatureDistillation]) -> None:
    """Raise ModelError if a cache would have to hold several layers of a teacher."""
    layers = {name: o.pairing.layer for name, o in objectives.items()}
    if config.teacher_cache.folder is None or len(set(layers.values())) == 1:
        return
    said = ", ".join(f"{n}: {'the last' if v is None else v}" for n, v in layers.items())
    raise ModelError(
        f"these students learn from different layers of the teacher ({said}), and a teacher cache "
        "has one",
        fix="give --teacher-layer, or leave out --teacher-cache",
    )


def teacher_of(config: DistillConfig) -> Backbone:
    """The frozen teacher."""
    return model_of(
        config.teacher,
        image_size=config.teacher.image_size,
        drop_path=config.teacher.drop_path,
        always_drop_path=config.teacher.drop_path > 0,
        seed=config.run.seed,
        quiet=True,  # described with the student
    )


def objective_of(
    config: DistillConfig,
) -> tuple[FeatureDistillation, Backbone | None, list[str]]:
    """Teacher and student behind one loss.

    Returns:
        The objective, the model that the student continues from, and what became of its weights.
    """
    return _taught_by(teacher_of(config), config)


def _taught_by(
    teacher: Backbone, config: DistillConfig
) -> tuple[FeatureDistillation, Backbone | None, list[str]]:
    source = _source(config, teacher)
    student, notes = _student(config, source)
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
    return objective, source, notes


def optimizer_of(config: DistillConfig, objective: FeatureDistillation) -> torch.optim.AdamW:
    """AdamW on a student and its projector."""
    groups = parameter_groups(
        [("student.model.", objective.student.model), ("projector.", objective.projector)],
        weight_decay=config.optimizer.weight_decay,
    )
    return adamw(groups, betas=config.optimizer.betas)


def _source(config: DistillConfig, teacher: Backbone) -> Backbone | None:
    """The model that the student continues from, if any."""
    match config.student.init:
        case "random":
            return None
        case "teacher":
            return teacher
        case spec:
            return load_backbone(spec)


def _student(config: DistillConfig, source: Backbone | None) -> tuple[Backbone, list[str]]:
    wanted = config.student
    assert isinstance(wanted.name, str)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
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
    if source is None:
        return student, []
    loading = () if wanted.init == "teacher" else source.origin.loading  # the teacher's is said
    return student, [*loading, *continue_from(student, source)]
