"""The schema of `compare`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from featdistill.config.commands.base import (
    DATA,
    RUN,
    TRAIN,
    Command,
)
from featdistill.config.sections import (
    DataConfig,
    FinetuneOptimizerConfig,
    FinetuneScheduleConfig,
    FinetuneViewConfig,
    KnnConfig,
    MixConfig,
    ModelConfig,
    Pool,
    Rate,
    RunConfig,
)


class CompareConfig(Command):
    """Is the distilled model better than what you had? Fine-tunes both, and a fresh one."""

    summary = "teacher, student and a fresh model under one recipe: which is better?"
    example = (
        "featdistill compare --teacher runs/teacher --student runs/distilled --data LABELLED "
        "--out runs/compared"
    )
    flat = {
        "teacher": "teacher.spec",
        "teacher-weights": "teacher.weights",
        "teacher-arch": "teacher.arch",
        "student": "student.spec",
        "student-weights": "student.weights",
        "student-arch": "student.arch",
        "scratch": "scratch",
        **DATA,
        "labels": "data.labels",
        "seeds": "seeds",
        "lrs": "lrs",
        **RUN,
        **TRAIN,
        "layer-decay": "optimizer.layer_decay",
        "drop-path": "drop_path",
        "pool": "pool",
    }

    teacher: ModelConfig
    student: ModelConfig
    scratch: bool = Field(True, description="also fine-tune the student's shape from nothing")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (1, 2, 3), min_length=1, description="seeds of the scored runs"
    )
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.25, 1.0, 4.0),
        min_length=1,
        description="learning rates to try for each row, as multiples of the recipe's",
    )
    sweep_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of the training labels that choose the rate"
    )
    knn: KnnConfig | None = Field(KnnConfig(), description="nearest neighbours beside it, or none")
    data: DataConfig
    view: FinetuneViewConfig = FinetuneViewConfig()
    mix: MixConfig = MixConfig()
    pool: Literal[Pool.MEAN, Pool.CLS] = Field(
        Pool.MEAN, description="vector given to the classifier: mean of the map, or cls"
    )
    drop_path: Rate = Field(0.1, description="stochastic depth rate")
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    schedule: FinetuneScheduleConfig = FinetuneScheduleConfig(epochs=100)
    run: RunConfig

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds must differ from each other: {','.join(map(str, seeds))}")
        return seeds
