"""The schemas of `diagnose`, `landscape` and their like."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from featdistill.config.commands.base import DATA, RUN, Command, EvalViewConfig
from featdistill.config.sections import DataConfig, Positive, Precision, Section


class DiagnoseRunConfig(Section):
    """Where a diagnosis is written and what computes it."""

    out: str = Field(description="output folder; new or empty")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    devices: Positive = Field(1, description="processes on this machine, one a device")


class DiagnoseFeaturesConfig(Section):
    """What `diagnose features` measures."""

    block: Annotated[int, Field(ge=4)] = Field(
        256, description="images of a block of the CKA estimate"
    )
    pictures: Annotated[int, Field(ge=0)] = Field(
        6, description="images to draw as principal components of their patch features"
    )
    foreground: bool = Field(
        False, description="find these components in the foreground alone: the thing in the middle"
    )


class DiagnoseAttentionConfig(Section):
    """How `diagnose attention` says what it measures."""

    unit: Literal["pixels", "patches", "relative"] = Field(
        "pixels",
        description="of attention distances: pixels, patches, or relative to uniform attention "
        "(which alone compares windows with whole maps)",
    )


class DiagnoseConfig(Command):
    """Look inside models, side by side, on the same images."""

    summary = "look inside models: what heads attend to, what features are like, by layer"
    example = (
        "featdistill diagnose features --model runs/teacher --model runs/student "
        "--data IMAGES --out diagnosed"
    )
    flat = {
        "kind": "kind",
        "model": "models",
        "name": "names",
        "weights": "weights",
        **DATA,
        "part": "part",
        "images": "images",
        **RUN,
        "image-size": "view.image_size",
        "batch-size": "data.batch_size",
        "workers": "data.workers",
        "unit": "attention.unit",
        "pictures": "features.pictures",
        "foreground": "features.foreground",
    }
    positional = "kind"

    kind: Literal["attention", "features"] = Field(
        description="what to look at: attention or features"
    )
    models: tuple[str, ...] = Field(min_length=1, description="models to look at; may be repeated")
    names: tuple[str, ...] = Field(
        (), description="what to call them, once for each model; teacher and student keep a colour"
    )
    weights: tuple[str, ...] = Field(
        ("hub",), description="hub, random or a file; once, or once for each model"
    )
    data: DataConfig
    part: Literal["train", "val", "test"] | None = Field(
        None, description="train, val or test; the held-out part by default, if there is one"
    )
    images: Positive = Field(
        1000, description="images to look at, evenly spread over the data; all, if there are fewer"
    )
    view: EvalViewConfig = EvalViewConfig()
    attention: DiagnoseAttentionConfig = DiagnoseAttentionConfig()
    features: DiagnoseFeaturesConfig = DiagnoseFeaturesConfig()
    run: DiagnoseRunConfig


class LossRunConfig(Section):
    """Where a measurement of a loss is written and what computes it."""

    out: str = Field(description="output folder; new, or empty, or to be resumed")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    devices: Positive = Field(1, description="processes on this machine, one a device")
    precision: Precision = Field(
        Precision.FLOAT32, description="float32, or bf16, which rounds small differences away"
    )
    threads: Positive | None = Field(
        None, description="CPU threads of the model; all cores by default (tiny models: 1)"
    )
    resume: bool = Field(False, description="continue what was begun in the output folder")


class LossConfig(Command):
    """Base of the commands that measure the loss of models around their weights."""

    flat: ClassVar[dict[str, str]] = {
        "model": "models",
        "name": "names",
        "weights": "weights",
        "objective": "objective",
        **DATA,
        "part": "part",
        "labels": "data.labels",
        "images": "images",
        **RUN,
        "image-size": "view.image_size",
        "batch-size": "data.batch_size",
        "workers": "data.workers",
        "resume": "run.resume",
    }

    models: tuple[str, ...] = Field(
        min_length=1,
        description="classifiers, or runs of distill; may be repeated: all on one scale",
    )
    names: tuple[str, ...] = Field(
        (), description="what to call them, once for each model; teacher and student keep a colour"
    )
    weights: tuple[str, ...] = Field(
        ("hub",), description="hub, random or a file; once, or once for each model"
    )
    objective: Literal["auto", "classification", "distillation"] = Field(
        "auto",
        description="whose loss: classification (of a model with a classifier), distillation (of a "
        "run of distill, with its teacher and projector), or auto: by the model",
    )
    data: DataConfig
    part: Literal["train", "val", "test"] = Field(
        "train", description="train (whose loss was minimised), val or test"
    )
    images: Positive = Field(
        1000, description="images, evenly spread over the data; all, if there are fewer"
    )
    view: EvalViewConfig = EvalViewConfig()
    memory: float = Field(
        4.0,
        ge=0,
        description="GiB of images and targets to keep on the device, for each model; more are "
        "read again each time",
    )
    run: LossRunConfig


class LandscapeConfig(LossConfig):
    """The loss around models' weights, or on the way from one model to another."""

    summary = "loss and accuracy around models' weights: how flat is the valley?"
    example = (
        "featdistill landscape --model runs/teacher-tuned --model runs/student-tuned "
        "--data LABELLED --out landscape"
    )
    flat = {
        "kind": "kind",
        **LossConfig.flat,
        "grid": "grid",
        "radius": "radius",
        "planes": "planes",
        "radii": "radii",
        "levels": "levels",
    }
    positional = "kind"

    kind: Literal["plane", "line", "between"] = Field(
        "plane",
        description="plane; line: many random directions by themselves, cheaply; between: on the "
        "straight line from one model to another",
    )
    grid: Annotated[int, Field(ge=3)] = Field(
        21, description="points along an axis; odd, so that the model itself is one"
    )
    radius: float | None = Field(
        None, gt=0, description="how far to go, in norms of the weights; 1 by default"
    )
    planes: Positive | None = Field(
        None, description="random planes, or lines; 1 plane or 10 lines by default"
    )
    radii: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.25, 0.5, 1.0), description="where the mean rise of the loss is measured"
    )
    levels: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="rises below which the area is measured, in the loss's unit; 0.1,0.5,1 of a "
        "classifier, 0.01,0.05,0.1 of a distillation",
    )

    @field_validator("grid")
    @classmethod
    def _centred(cls, grid: int, info: ValidationInfo) -> int:
        if info.data.get("kind") == "between" and grid % 4 != 1:
            raise ValueError(
                f"given {grid}; expected 4 n + 1 (21, 41), so that both models are among the points"
            )
        if grid % 2 == 0:
            raise ValueError(
                f"given {grid}; expected an odd number, so that the model itself is a point"
            )
        return grid
