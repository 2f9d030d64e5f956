"""The schemas of `distill` and `check`."""

from __future__ import annotations

from pydantic import Field, model_validator

from featdistill.config.commands.base import (
    DATA,
    EXTEND,
    OBJECTIVE,
    RUN,
    SIGNAL,
    STUDENT,
    TEACHER,
    TEACHER_CACHE,
    TRAIN,
    Command,
)
from featdistill.config.sections import (
    CachedDataConfig,
    ObjectiveConfig,
    StudentConfig,
    TeacherCacheConfig,
    TeacherConfig,
    ViewConfig,
)
from featdistill.config.training import (
    OptimizerConfig,
    ScheduleConfig,
    SignalConfig,
    TrainRunConfig,
)


class DistillRunConfig(TrainRunConfig):
    """Where a distillation lives, and whether it looks before it leaps."""

    best: str | None = Field(
        None,
        description="keep the best state by this score too: holdout_loss, holdout_cosine, "
        "holdout_explained_variance, student_rank or knn_top1",
    )
    preflight: bool = Field(
        True, description="take a dry step first, and say what the run will cost"
    )


class DistillConfig(Command):
    """Teach a fresh student the whitened feature map of a frozen teacher."""

    summary = "teach a fresh student the whitened features of a frozen teacher"
    example = (
        "featdistill distill --teacher timm/vit_base_patch16_224.dino --student vit-b "
        "--data IMAGES --epochs 300 --out runs/distilled"
    )
    flat = {
        **TEACHER,
        **STUDENT,
        **DATA,
        **RUN,
        **TRAIN,
        **EXTEND,
        **OBJECTIVE,
        **SIGNAL,
        **TEACHER_CACHE,
    }

    teacher: TeacherConfig
    student: StudentConfig = StudentConfig()
    data: CachedDataConfig
    view: ViewConfig = ViewConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig(epochs=300)
    signal: SignalConfig = SignalConfig()
    teacher_cache: TeacherCacheConfig = TeacherCacheConfig()
    run: DistillRunConfig

    @model_validator(mode="after")
    def _still_teacher(self) -> DistillConfig:
        if self.teacher_cache.folder and self.data.cache == "device":
            raise ValueError(
                "--data.cache device brings no teacher's features along; give --data.cache disk, "
                "or leave out --teacher-cache"
            )
        if self.teacher_cache.folder and self.teacher.drop_path:
            raise ValueError(
                f"--teacher-cache keeps one answer to each view, and a teacher with a drop path of "
                f"{self.teacher.drop_path:g} has many; leave out --teacher.drop_path, or the cache"
            )
        return self


class CheckRunConfig(DistillRunConfig):
    """A dry run: nothing is written."""

    out: str = Field("", description="not used: nothing is written")


class CheckConfig(DistillConfig):
    """Build everything, run one step, and say what a distillation would cost."""

    summary = "build everything, run one step, and say what a distillation would cost"
    example = "featdistill check --teacher timm/vit_base_patch16_224.dino --data IMAGES"

    run: CheckRunConfig = CheckRunConfig()
