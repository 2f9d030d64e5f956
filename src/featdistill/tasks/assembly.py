"""Everything that a distillation needs, built and checked before any long work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from featdistill.config.commands import DistillConfig
from featdistill.config.sections import Precision
from featdistill.data.holdout import HeldOut, without
from featdistill.data.parts import Data
from featdistill.data.views import CropView
from featdistill.engine.batches import check_batch
from featdistill.engine.best import Choice
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


@dataclass(frozen=True)
class Assembly:
    """Everything that a distillation needs, built and checked."""

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


def assemble(config: DistillConfig) -> Assembly:
    """Build teacher, student, objective and data; every mistake comes out here."""
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
    objective, source, notes = objective_of(config)
    teacher, student = objective.teacher, objective.student
    settle(runtime, student, config.run)
    runtime.suit(teacher)
    lay_out_convolutions(teacher.model)
    match config.teacher.precision:
        case Precision.BF16:
            objective.teacher_precision = "bf16"
        case Precision.FLOAT32:
            objective.teacher_precision = "float32"
        case Precision.AUTO:
            objective.teacher_precision = "bf16" if runtime.pays(teacher) else None
    if config.student.drop_path_way == "skip":
        skip_dropped(student.model, student.slot)
    # rendered once at the larger of the two sizes, so that neither model sees enlarged pixels
    side = max(student.image_size[0], teacher.image_size[0])
    view = CropView(side, config.view.crop_scale, config.view.crop_ratio, config.view.flip)
    weights = {"teacher": teacher.origin.weights}
    if source is not None and source is not teacher:
        weights["student"] = source.origin.weights
    return Assembly(
        data, view, objective, schedule, runtime, tuple(notes), weights, held, voters, best
    )


def objective_of(
    config: DistillConfig,
) -> tuple[FeatureDistillation, Backbone | None, list[str]]:
    """Teacher and student behind one loss.

    Returns:
        The objective, the model that the student continues from, and what became of its weights.
    """
    teacher = model_of(
        config.teacher,
        image_size=config.teacher.image_size,
        drop_path=config.teacher.drop_path,
        always_drop_path=config.teacher.drop_path > 0,
        seed=config.run.seed,
        quiet=True,  # described with the student
    )
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
