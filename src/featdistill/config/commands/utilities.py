"""The schemas of `export`, `models`, `recipes` and `quickstart`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from featdistill.config.commands.base import (
    Command,
)
from featdistill.config.sections import ModelConfig


class ExportConfig(Command):
    """Write a model for timm, transformers, ONNX or the official code, and check it there."""

    summary = "write a model for timm, transformers, ONNX or the official code, and check it"
    example = "featdistill export --model runs/distilled --to onnx --out exported"
    flat = {
        "model": "model.spec",
        "weights": "model.weights",
        "arch": "model.arch",
        "branch": "model.branch",
        "to": "to",
        "out": "out",
        "tolerance": "tolerance",
    }
    positional = "model"

    model: ModelConfig
    to: Literal["timm", "huggingface", "onnx", "plain", "official"] = Field(
        "timm",
        description="format: timm, huggingface (transformers' own layout), onnx, plain (state "
        "dict) or official (feature distillation's own checkpoint)",
    )
    out: str = Field(description="folder to write; new or empty")
    tolerance: float | None = Field(
        None,
        gt=0,
        description="largest difference to let pass when it is loaded back, as a share of the "
        "largest output; the format's own by default",
    )


class ReportConfig(Command):
    """Make one page of what runs, comparisons and diagnoses found, from their files alone."""

    summary = "make one page of runs, comparisons and diagnoses"
    example = "featdistill report runs/distilled diagnosed --out report"
    flat = {"run": "runs", "out": "out"}
    positional = "run"

    runs: tuple[str, ...] = Field(
        min_length=1, description="folders that commands wrote; may be repeated"
    )
    out: str | None = Field(
        None, description="folder for the page; report/ in the first by default"
    )


class ModelsConfig(Command):
    """List students and the teachers that timm knows."""

    summary = "list the students, and search timm for teachers"
    example = "featdistill models dino"
    flat = {"search": "search", "json": "as_json"}
    positional = "search"

    search: str | None = Field(None, description="part of a teacher's name")
    as_json: bool = Field(False, description="print JSON")


class RecipesConfig(Command):
    """List the recipes, or print one."""

    summary = "list the recipes, or print one"
    example = "featdistill recipes fd-dino-vit-b"
    flat = {"name": "name"}
    positional = "name"

    name: str | None = Field(None, description="recipe to print")


class QuickstartConfig(Command):
    """The whole loop in minutes, offline, on scikit-learn's digits."""

    summary = "the whole loop in minutes, offline: pretrain, distill, compare, report"
    example = "featdistill quickstart --out runs/quickstart"
    flat = {"out": "out", "seed": "seed", "device": "device", "resume": "resume"}

    out: str = Field("runs/quickstart", description="output folder")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    resume: bool = Field(False, description="continue what was begun in the output folder")
