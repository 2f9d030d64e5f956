"""The schema of `bench`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from featdistill.config.commands.base import Command
from featdistill.config.sections import Positive, Precision, Rate

# what each of these options is of; the others are of all
_OF = {
    **dict.fromkeys(("data", "images"), ("data", "caches")),
    **dict.fromkeys(("teacher", "student", "drop_path", "precision"), ("step",)),
    **dict.fromkeys(("cached", "changes", "profile"), ("step",)),
    "model": ("diagnose", "landscape", "load"),
    "image_size": ("step", "data", "caches", "diagnose", "landscape"),
    "batch_size": ("step", "diagnose", "landscape"),
}


class BenchConfig(Command):
    """Time a part of the project beside doing it plainly."""

    summary = "time a part of the project beside the same done plainly"
    example = "featdistill bench step --changes"
    flat = {
        "what": "what",
        "data": "data",
        "images": "images",
        "model": "model",
        "image-size": "image_size",
        "batch-size": "batch_size",
        "teacher": "teacher",
        "student": "student",
        "precision": "precision",
        "cached": "cached",
        "changes": "changes",
        "profile": "profile",
        "rounds": "rounds",
        "device": "device",
        "threads": "threads",
        "json": "as_json",
    }
    positional = "what"

    what: Literal["step", "data", "caches", "load", "diagnose", "landscape"] = Field(
        description="what to time: step (of a distillation, beside the official code's), data "
        "(reading images, likewise), caches (of images, beside decoding them), load (start-up "
        "beside importing torch and timm, files beside loading them plainly), diagnose (attention "
        "beside a plain forward pass) or landscape (its points beside plain evaluations)"
    )
    data: str | None = Field(
        None,
        description="data: a folder of images, made photographs of 500x400 by default; caches: "
        "any data whose images have one size",
    )
    images: Positive = Field(64, description="data, caches: how many images")
    teacher: str = Field(
        "timm/vit_base_patch16_224", description="step: teacher, with random weights"
    )
    student: str = Field("vit-b", description="step: student")
    drop_path: Rate = Field(0.0, description="step: the student's stochastic depth rate")
    precision: Precision = Field(Precision.AUTO, description="step: auto, float32 or bf16")
    cached: bool = Field(
        False,
        description="step: the batch brings the teacher's features, as from a cache (the "
        "reference runs the teacher)",
    )
    changes: bool = Field(False, description="step: time what each change brings, too")
    profile: str | None = Field(
        None, description="step: a folder for a trace of a step and a table of where its time goes"
    )
    model: str = Field(
        "timm/vit_base_patch16_224",
        description="diagnose, landscape, load: model, with random weights",
    )
    image_size: Positive | None = Field(
        None, description="side in pixels; the model's own, or 224 for data, 32 for caches"
    )
    batch_size: Positive | None = Field(
        None, description="images of a step (4; CUDA 128), of a pass or an evaluation (8)"
    )
    rounds: Positive = Field(5, description="rounds in which each takes its turn")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    threads: Positive | None = Field(None, description="CPU threads; all cores by default")
    as_json: bool = Field(False, description="print one JSON object")

    @model_validator(mode="after")
    def _of_what(self) -> BenchConfig:
        for name, whose in _OF.items():
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and self.what not in whose:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} is of bench {' or '.join(whose)}, and of no use to {self.what}"
                )
        return self
