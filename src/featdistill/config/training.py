"""The sections of how a run goes: optimiser, schedule, devices, and what is measured meanwhile.

Importing this file must stay cheap: `featdistill COMMAND --help` reads it and nothing heavier.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from featdistill.config.sections import Positive, Precision, Rate, Section


class OptimizerConfig(Section):
    """AdamW."""

    lr: float | None = Field(None, gt=0, description="peak learning rate; default: scaled to batch")
    lr_per_512: float = Field(3e-4, gt=0, description="peak rate for each 512 images of batch")
    weight_decay: float = Field(0.05, ge=0, description="not on biases, norms, 1-d parameters")
    betas: tuple[Rate, Rate] = Field((0.9, 0.999), description="AdamW's averages")
    clip: float | None = Field(3.0, gt=0, description="largest gradient norm, or none")


class FinetuneOptimizerConfig(OptimizerConfig):
    """AdamW with layer decay."""

    lr_per_512: float = Field(1.25e-3, gt=0, description="peak rate for each 512 images of batch")
    clip: float | None = Field(5.0, gt=0, description="largest gradient norm, or none")
    layer_decay: float = Field(0.65, gt=0, le=1, description="each layer's rate over the next's")


class ScheduleConfig(Section):
    """How long, and how the learning rate goes: linear warm-up, then a cosine, by step."""

    epochs: float | None = Field(None, gt=0, description="passes over the data")
    steps: Positive | None = Field(None, description="optimiser steps, instead of epochs")
    warmup: float = Field(
        1 / 30, ge=0, lt=1, description="share of the steps for warm-up (10 of 300 epochs)"
    )
    start_ratio: float = Field(1 / 600, ge=0, description="first rate over peak rate")
    final_ratio: float = Field(1 / 60, ge=0, description="last rate over peak rate")
    stop_at: Positive | None = Field(
        None, description="stop (to be resumed) at this step of the longer schedule"
    )

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps, not both")
        return self


class FinetuneScheduleConfig(ScheduleConfig):
    """Fine-tuning's schedule."""

    warmup: float = Field(
        0.2, ge=0, lt=1, description="share of the steps for warm-up (20 of 100 epochs)"
    )
    start_ratio: float = Field(1 / 5000, ge=0, description="first rate over peak rate")
    final_ratio: float = Field(1 / 5000, ge=0, description="last rate over peak rate")


class PolynomialScheduleConfig(ScheduleConfig):
    """Segmentation's schedule: linear warm-up, then a polynomial, by step."""

    power: float = Field(1.0, gt=0, description="power of the polynomial decay; 1: a line")
    warmup: float = Field(
        1500 / 160_000, ge=0, lt=1, description="share of the steps for warm-up (1500 of 160,000)"
    )
    start_ratio: float = Field(1e-6, ge=0, description="first rate over peak rate")
    final_ratio: float = Field(0.0, ge=0, description="last rate over peak rate")


class RunConfig(Section):
    """Where the run lives and what it runs on."""

    out: str = Field(description="output folder; new, or empty, or to be resumed")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    devices: Positive = Field(1, description="processes on this machine, one a device")
    nodes: Positive = Field(1, description="machines")
    precision: Precision = Field(
        Precision.AUTO,
        description="float32 or bf16; auto: bf16 on CUDA, and for large models on a CPU that is "
        "measured to be quick at it",
    )
    attention: Literal["auto", "fused", "lean", "naive"] = Field(
        "auto",
        description="attention of the models, all the same mathematics; auto: lean on a CPU, "
        "fused on CUDA",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="compile the trained model block by block; auto: off"
    )
    recompute: bool = Field(
        False,
        description="keep only each block's input for the backward pass and compute the rest "
        "again: less memory, a third more work",
    )
    micro_batches: Positive = Field(1, description="parts in which a batch passes the model")
    threads: Positive | None = Field(
        None, description="CPU threads of the model; all cores by default (tiny models: 1)"
    )
    resume: bool = Field(False, description="continue the run in the output folder")
    log_every: Positive = Field(10, description="steps between log lines")
    checkpoint_every: Positive = Field(500, description="steps between checkpoints")
    checkpoint_keep: Positive = Field(2, description="checkpoints to keep")
    eval_every: Positive | None = Field(
        None, description="steps between evaluations; a tenth of the run by default"
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="a step whose loss or gradient is no number, which the weights never see: "
        "stop, or skip it",
    )
    nonfinite_limit: Annotated[int, Field(ge=0)] = Field(
        10, description="number of steps that a run may skip before it stops"
    )
    tensorboard: bool = Field(True, description="write TensorBoard events")


class TrainRunConfig(RunConfig):
    """Where a training lives, which may be made longer (or shorter) when it is resumed."""

    extend: str | None = Field(
        None,
        description="with --resume: go on by a schedule of another length, epochs=N or steps=N",
    )

    @field_validator("extend")
    @classmethod
    def _a_length(cls, value: str | None) -> str | None:
        name, _, number = (value or "epochs=1").partition("=")
        if name not in ("epochs", "steps") or not number:
            raise ValueError(f"given '{value}'; expected epochs=N or steps=N")
        return value

    @model_validator(mode="after")
    def _of_a_run(self) -> TrainRunConfig:
        if self.extend is not None and not self.resume:
            raise ValueError(f"--extend {self.extend} is for a run that goes on; give --resume too")
        return self


class SignalConfig(Section):
    """What is measured while a student learns, on images that it does not train on."""

    holdout: str | None = Field(
        "auto",
        description="share (0.02) or number of training images to hold out, or another data set; "
        "auto: some of the validation or test part, if there is one; none: off",
    )
    knn_data: str | None = Field(
        None, description="labelled data with a held-out part, to score by nearest neighbours"
    )
    knn_labels: str | None = Field(None, description="label budget of the voters: N a class, or P%")
    knn_k: Positive = Field(20, description="neighbours that vote")
    rank_alarm: Rate = Field(
        0.25,
        description="warn if the features' effective rank falls below this share of the teacher's "
        "or of its own start; 0: never",
    )

    @field_validator("holdout", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        if isinstance(value, str) and value.lower() == "none":
            return None
        return str(value) if isinstance(value, int | float) else value
