"""The schemas of `knn`, `predict` and `features`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from featdistill.config.commands.base import (
    DATA,
    RUN,
    Command,
    EvalRunConfig,
    EvalViewConfig,
)
from featdistill.config.sections import DataConfig, KnnConfig, ModelConfig, Positive, Section


class KnnCommandConfig(Command):
    """Classify by nearest neighbours in the features of frozen models."""

    summary = "classify by nearest neighbours in frozen features"
    example = "featdistill knn --model runs/teacher --model runs/distilled --data LABELLED"
    flat = {
        "model": "models",
        "weights": "weights",
        **DATA,
        "labels": "data.labels",
        **RUN,
        "image-size": "view.image_size",
        "batch-size": "data.batch_size",
        "workers": "data.workers",
        "k": "knn.k",
        "pool": "knn.pool",
    }

    models: tuple[str, ...] = Field(min_length=1, description="models to score; may be repeated")
    weights: tuple[str, ...] = Field(
        ("hub",), description="hub, random or a file; once, or once for each model"
    )
    data: DataConfig
    view: EvalViewConfig = EvalViewConfig()
    knn: KnnConfig = KnnConfig()
    run: EvalRunConfig = EvalRunConfig()


class PredictConfig(Command):
    """Name what is in images, with a fine-tuned classifier."""

    summary = "classify images with a fine-tuned model"
    example = "featdistill predict --model runs/finetuned --data IMAGES --out predictions"
    flat = {
        "model": "model.spec",
        "weights": "model.weights",
        "arch": "model.arch",
        "data": "data.path",
        **RUN,
        "top": "top",
        "image-size": "view.image_size",
        "batch-size": "data.batch_size",
        "workers": "data.workers",
    }

    model: ModelConfig
    data: DataConfig
    view: EvalViewConfig = EvalViewConfig()
    top: Positive = Field(5, description="classes to name for each image")
    run: EvalRunConfig = EvalRunConfig()


class FeaturesRunConfig(Section):
    """Where features are written and what computes them."""

    out: str = Field(description="output folder; new, or empty, or to be resumed")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    resume: bool = Field(False, description="continue what was begun in the output folder")


class FeaturesConfig(Command):
    """Write the features of images to files."""

    summary = "write the features of images to safetensors or parquet"
    example = "featdistill features --model runs/distilled --data IMAGES --out features"
    flat = {
        "model": "model.spec",
        "weights": "model.weights",
        "arch": "model.arch",
        **DATA,
        "part": "part",
        **RUN,
        "what": "what",
        "layers": "layers",
        "format": "format",
        "dtype": "dtype",
        "image-size": "view.image_size",
        "batch-size": "data.batch_size",
        "workers": "data.workers",
        "shard-images": "shard_images",
        "resume": "run.resume",
    }

    model: ModelConfig
    data: DataConfig
    part: Literal["train", "val", "test"] | None = Field(
        None, description="train, val or test; the held-out part by default, if there is one"
    )
    view: EvalViewConfig = EvalViewConfig()
    what: tuple[Literal["pooled", "mean", "map", "prefix", "logits"], ...] = Field(
        ("pooled",),
        description="pooled (as the model pools), mean (of the map), map, prefix, logits; several "
        "separated by commas",
    )
    layers: tuple[int, ...] = Field(
        (),
        description="intermediate layers to write too: of each those of mean, map and prefix that "
        "--what names, or else map and prefix; negative from the end",
    )
    format: Literal["safetensors", "parquet"] = Field(
        "safetensors", description="safetensors or parquet"
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="float32 or float16")
    shard_images: Positive | None = Field(
        None, description="images for each file; at most 4096 and 512 MiB by default"
    )
    run: FeaturesRunConfig

    @field_validator("what")
    @classmethod
    def _something(cls, what: tuple[str, ...]) -> tuple[str, ...]:
        if not what:
            raise ValueError("name at least one of pooled, mean, map, prefix and logits")
        return what
