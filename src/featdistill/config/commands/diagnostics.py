"""The schema of `diagnose`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from featdistill.config.commands.base import DATA, RUN, Command, EvalViewConfig
from featdistill.config.sections import DataConfig, Positive, Section


class DiagnoseRunConfig(Section):
    """Where a diagnosis is written and what computes it."""

    out: str = Field(description="output folder; new or empty")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")


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
