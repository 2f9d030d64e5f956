"""One schema a command, with the short names of its everyday options."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from featdistill.config.sections import (
    ContrastiveConfig,
    ContrastiveViewConfig,
    DataConfig,
    FinetuneOptimizerConfig,
    FinetuneScheduleConfig,
    FinetuneViewConfig,
    KnnConfig,
    MixConfig,
    ModelConfig,
    NewModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Pool,
    Positive,
    Rate,
    RunConfig,
    ScheduleConfig,
    Section,
    StudentConfig,
    TeacherConfig,
    ViewConfig,
)

_DATA = {"data": "data.path", "val-data": "data.val", "val-fraction": "data.val_fraction"}
_RUN = {"out": "run.out", "seed": "run.seed", "device": "run.device"}
_TRAIN = {
    "image-size": "view.image_size",
    "batch-size": "data.batch_size",
    "epochs": "schedule.epochs",
    "steps": "schedule.steps",
    "lr": "optimizer.lr",
    "workers": "data.workers",
    "precision": "run.precision",
    "resume": "run.resume",
}
_TEACHER = {
    "teacher": "teacher.spec",
    "teacher-weights": "teacher.weights",
    "teacher-arch": "teacher.arch",
    "teacher-layer": "teacher.layer",
    "teacher-image-size": "teacher.image_size",
}
_STUDENT = {
    "student": "student.name",
    "student-patch": "student.patch",
    "student-init": "student.init",
    "position": "student.position",
    "drop-path": "student.drop_path",
}
_OBJECTIVE = {
    "target": "objective.target",
    "whitening": "objective.whitening",
    "loss": "objective.loss",
}


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


class DistillRunConfig(RunConfig):
    """Where a distillation lives, and whether it looks before it leaps."""

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
    flat = {**_TEACHER, **_STUDENT, **_DATA, **_RUN, **_TRAIN, **_OBJECTIVE}

    teacher: TeacherConfig
    student: StudentConfig = StudentConfig()
    data: DataConfig
    view: ViewConfig = ViewConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig(epochs=300)
    run: DistillRunConfig


class CheckRunConfig(DistillRunConfig):
    """A dry run: nothing is written."""

    out: str = Field("", description="not used: nothing is written")


class CheckConfig(DistillConfig):
    """Build everything, run one step, and say what a distillation would cost."""

    summary = "build everything, run one step, and say what a distillation would cost"
    example = "featdistill check --teacher timm/vit_base_patch16_224.dino --data IMAGES"

    run: CheckRunConfig = CheckRunConfig()


class FinetuneConfig(Command):
    """Fine-tune a backbone for classification."""

    summary = "fine-tune a backbone for classification"
    example = "featdistill finetune --model runs/distilled --data LABELLED --out runs/finetuned"
    flat = {
        "model": "model.spec",
        "weights": "model.weights",
        "arch": "model.arch",
        **_DATA,
        "labels": "data.labels",
        **_RUN,
        **_TRAIN,
        "layer-decay": "optimizer.layer_decay",
        "drop-path": "drop_path",
        "pool": "pool",
    }

    model: ModelConfig
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


class PretrainConfig(Command):
    """Make a teacher where none can be downloaded: SimCLR."""

    summary = "make a contrastive teacher from your own images (SimCLR)"
    example = "featdistill pretrain --model vit-s --data IMAGES --epochs 100 --out runs/teacher"
    flat = {
        "model": "model.name",
        "model-patch": "model.patch",
        "drop-path": "model.drop_path",
        **_DATA,
        **_RUN,
        **_TRAIN,
        "temperature": "objective.temperature",
    }

    model: NewModelConfig = NewModelConfig()
    data: DataConfig
    view: ContrastiveViewConfig = ContrastiveViewConfig()
    objective: ContrastiveConfig = ContrastiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr_per_512=1e-3)
    schedule: ScheduleConfig = ScheduleConfig(epochs=100, warmup=0.1)
    run: RunConfig


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


class KnnCommandConfig(Command):
    """Classify by nearest neighbours in the features of frozen models."""

    summary = "classify by nearest neighbours in frozen features"
    example = "featdistill knn --model runs/teacher --model runs/distilled --data LABELLED"
    flat = {
        "model": "models",
        "weights": "weights",
        **_DATA,
        "labels": "data.labels",
        **_RUN,
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
        **_RUN,
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
        **_DATA,
        "part": "part",
        **_RUN,
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
        **_DATA,
        "labels": "data.labels",
        "seeds": "seeds",
        "lrs": "lrs",
        **_RUN,
        **_TRAIN,
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


COMMANDS: dict[str, type[Command]] = {
    "quickstart": QuickstartConfig,
    "check": CheckConfig,
    "distill": DistillConfig,
    "compare": CompareConfig,
    "finetune": FinetuneConfig,
    "knn": KnnCommandConfig,
    "predict": PredictConfig,
    "features": FeaturesConfig,
    "pretrain": PretrainConfig,
    "export": ExportConfig,
    "models": ModelsConfig,
    "recipes": RecipesConfig,
}
