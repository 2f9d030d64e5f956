"""What the commands' schemas share: their base, and the short names of everyday options."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from featdistill.config.sections import Positive, Section

DATA = {"data": "data.path", "val-data": "data.val", "val-fraction": "data.val_fraction"}
RUN = {"out": "run.out", "seed": "run.seed", "device": "run.device"}
TRAIN = {
    "image-size": "view.image_size",
    "batch-size": "data.batch_size",
    "epochs": "schedule.epochs",
    "steps": "schedule.steps",
    "lr": "optimizer.lr",
    "workers": "data.workers",
    "precision": "run.precision",
    "compile": "run.compile",
    "resume": "run.resume",
}
EXTEND = {"extend": "run.extend"}
TEACHER = {
    "teacher": "teacher.spec",
    "teacher-weights": "teacher.weights",
    "teacher-arch": "teacher.arch",
    "teacher-layer": "teacher.layer",
    "teacher-image-size": "teacher.image_size",
}
TEACHER_CACHE = {
    "teacher-cache": "teacher_cache.folder",
    "teacher-cache-views": "teacher_cache.views",
}
STUDENT = {
    "student": "student.name",
    "student-patch": "student.patch",
    "student-init": "student.init",
    "position": "student.position",
    "drop-path": "student.drop_path",
}
OBJECTIVE = {
    "target": "objective.target",
    "whitening": "objective.whitening",
    "loss": "objective.loss",
}
SIGNAL = {"holdout": "signal.holdout", "knn-data": "signal.knn_data", "best": "run.best"}


class Command(Section):
    """Base of the commands' schemas.

    Attributes:
        summary: one line for the list of commands.
        example: a command line that works.
        flat: short option name -> dotted path; the everyday options, in the order of the help.
        positional: the short name that a bare argument fills, if any.
    """

    summary: ClassVar[str]
    example: ClassVar[str]
    flat: ClassVar[dict[str, str]]
    positional: ClassVar[str | None] = None


class EvalRunConfig(Section):
    """Where an evaluation writes and what it runs on."""

    out: str | None = Field(None, description="folder for the result, if it is to be kept")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")


class EvalViewConfig(Section):
    """How an image is cut for an evaluation."""

    image_size: Positive | None = Field(
        None, description="side in pixels; each model's own by default"
    )
    eval_crop: float = Field(0.875, gt=0, le=1, description="share of the side kept")
