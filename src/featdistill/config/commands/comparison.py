"""The schema of `compare`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from featdistill.config.commands.base import (
    DATA,
    RUN,
    TRAIN,
    Command,
)
from featdistill.config.sections import (
    DiskCachedDataConfig,
    FinetuneViewConfig,
    KnnConfig,
    MixConfig,
    ModelConfig,
    Pool,
    Positive,
    Rate,
    Section,
)
from featdistill.config.training import FinetuneOptimizerConfig, FinetuneScheduleConfig, RunConfig

ROWS = ("teacher", "student", "scratch")  # those that every comparison knows


def named(text: str) -> tuple[str | None, str]:
    """The name and the model of a further row: `NAME=MODEL`, or a model alone.

    A path with an equals sign in it is no name: a name has no slash.
    """
    name, equals, spec = text.partition("=")
    if not equals or "/" in name:
        return None, text
    return name.strip(), spec.strip()


def slug(title: str) -> str:
    """A title as the name of a row and of its folder."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


class SegmentRowConfig(Section):
    """Segmentation beside classification: every row's backbone is trained and scored on it too."""

    data: str | None = Field(
        None, description="segmentation data (ADE20K, ...): adds every row's mIoU"
    )
    recipe: str | None = Field(
        None, description="recipe of `segment`: seg-dino-vit-b, seg-vit-b, ...; or its defaults"
    )
    steps: Positive | None = Field(None, description="steps, instead of the recipe's")
    image_size: Positive | None = Field(None, description="crop, instead of the recipe's, pixels")
    batch_size: Positive | None = Field(None, description="batch, instead of the recipe's")
    head: Literal["upernet", "linear"] | None = Field(
        None, description="upernet or linear, instead of the recipe's"
    )
    layers: tuple[int, ...] | None = Field(
        None, description="four layers for UperNet, instead of the recipe's"
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
        "also": "also",
        "scratch": "scratch",
        **DATA,
        "labels": "data.labels",
        "seeds": "seeds",
        "lrs": "lrs",
        "extend-lrs": "extend_lrs",
        **RUN,
        **TRAIN,
        "layer-decay": "optimizer.layer_decay",
        "drop-path": "drop_path",
        "pool": "pool",
        "segment-data": "segment.data",
        "segment-recipe": "segment.recipe",
        "segment-steps": "segment.steps",
    }

    teacher: ModelConfig
    student: ModelConfig
    also: tuple[str, ...] = Field(
        (),
        description="further models as rows of their own, MODEL or NAME=MODEL (a second round, a "
        "student of pooled features or logits, ...); may be repeated",
    )
    scratch: bool = Field(True, description="also fine-tune the student's shape from nothing")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (1, 2, 3), min_length=1, description="seeds of the scored runs"
    )
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.25, 1.0, 4.0),
        min_length=1,
        description="learning rates to try for each row, as multiples of the recipe's",
    )
    extend_lrs: Annotated[int, Field(ge=0)] = Field(
        1,
        description="how often a row whose best rate is the outermost one tries another beyond it; "
        "0: never",
    )
    sweep_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of the training labels that choose the rate"
    )
    knn: KnnConfig | None = Field(KnnConfig(), description="nearest neighbours beside it, or none")
    segment: SegmentRowConfig = SegmentRowConfig()
    data: DiskCachedDataConfig
    view: FinetuneViewConfig = FinetuneViewConfig()
    mix: MixConfig = MixConfig()
    pool: Literal[Pool.MEAN, Pool.CLS] = Field(
        Pool.MEAN, description="vector given to the classifier: mean of the map, or cls"
    )
    drop_path: Rate = Field(0.1, description="stochastic depth rate")
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    schedule: FinetuneScheduleConfig = FinetuneScheduleConfig(epochs=100)
    run: RunConfig

    @field_validator("also")
    @classmethod
    def _own_names(cls, also: tuple[str, ...]) -> tuple[str, ...]:
        taken = dict.fromkeys(ROWS, "")
        for text in also:
            name, spec = named(text)
            if not spec or name == "":
                raise ValueError(f"given '{text}'; expected MODEL or NAME=MODEL")
            if name is None:
                continue
            short = slug(name)
            if not short:
                raise ValueError(f"'{name}' names no row; expected a letter or a digit in it")
            if short in taken:
                other = f"'{taken[short]}'" if taken[short] else f"the row '{short}'"
                raise ValueError(f"'{text}' has the name of {other}; give it another")
            taken[short] = text
        return also

    @field_validator("seeds", "lrs")
    @classmethod
    def _distinct(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if len(set(values)) != len(values):
            given = ",".join(map(str, values))
            raise ValueError(f"{info.field_name} must differ from each other: {given}")
        return values
