"""The schema of `probe`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, field_validator

from featdistill.config.commands.base import DATA, RUN, Command
from featdistill.config.sections import CropConfig, DiskCachedDataConfig, Positive, Rate, Section
from featdistill.config.training import RunConfig, ScheduleConfig


class ProbePool(StrEnum):
    """How a map and its prefix become one vector."""

    MEAN = "mean"
    CLS = "cls"
    BOTH = "both"
    MODEL = "model"


class GridConfig(Section):
    """Heads on features that are computed once, and the choice among them."""

    solver: Literal["lbfgs", "sgd"] = Field(
        "lbfgs",
        description="lbfgs: each weight decay's minimum (logistic regression); sgd: learning rates "
        "x weight decays, trained at once",
    )
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None,
        description="weight decays to choose from; by default 1e-8 to 1e-2 in half decades "
        "(sgd: 0, 1e-7, 1e-6, 1e-5, 1e-4)",
    )
    lrs: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="learning rates of sgd to choose from; by default 0.03,0.1,0.3,1,3,10",
    )
    steps: Positive | None = Field(
        None, description="steps of sgd; ten passes by default, and 1000 at least"
    )
    batch_size: Positive = Field(256, description="images of a step of sgd")
    fraction: float = Field(
        0.2, gt=0, lt=1, description="share of the training labels that choose the setting"
    )
    refit: bool = Field(True, description="fit the chosen setting again on all training labels")
    crops: Annotated[int, Field(ge=0)] = Field(
        0, description="random crops of each training image; 0: the evaluation crop alone"
    )


class OnlineConfig(Section):
    """A head that is trained on random crops, as papers do it."""

    optimizer: Literal["sgd", "lars"] = Field("sgd", description="sgd or lars")
    lr: float | None = Field(None, gt=0, description="peak learning rate; default: scaled to batch")
    lr_per_512: float = Field(0.2, gt=0, description="peak rate for each 512 images of batch")
    momentum: Rate = Field(0.9, description="momentum")
    weight_decay: float = Field(0.0, ge=0, description="of the weight, not of the bias")
    norm: Literal["batch", "none"] = Field(
        "batch", description="before the head: batch norm without scale and shift, or none"
    )


class ProbeConfig(Section):
    """A linear probe of frozen features."""

    style: Literal["grid", "online"] = Field(
        "grid",
        description="grid: features once, then a choice of settings; online: a fresh crop in each "
        "epoch, one setting",
    )
    pool: ProbePool = Field(
        ProbePool.MEAN, description="mean of the map, cls, both, or as the model pools"
    )
    layers: Positive = Field(1, description="last layers whose vectors are joined")
    grid: GridConfig = GridConfig()
    online: OnlineConfig = OnlineConfig()


class ProbeViewConfig(CropConfig):
    """How images are cut for a probe."""

    image_size: Positive | None = Field(
        None, description="side in pixels; each model's own by default"
    )
    eval_crop: float = Field(0.875, gt=0, le=1, description="share of the side kept when scoring")


class ProbeCommandConfig(Command):
    """Train linear classifiers on the features of frozen models."""

    summary = "train linear classifiers on frozen features, and choose among a grid of them"
    example = (
        "featdistill probe --model runs/teacher --model runs/distilled --data LABELLED "
        "--out runs/probed"
    )
    flat = {
        "model": "models",
        "name": "names",
        "weights": "weights",
        **DATA,
        "labels": "data.labels",
        "seeds": "seeds",
        **RUN,
        "style": "probe.style",
        "pool": "probe.pool",
        "layers": "probe.layers",
        "crops": "probe.grid.crops",
        "solver": "probe.grid.solver",
        "weight-decays": "probe.grid.weight_decays",
        "lrs": "probe.grid.lrs",
        "optimizer": "probe.online.optimizer",
        "lr": "probe.online.lr",
        "epochs": "schedule.epochs",
        "steps": "schedule.steps",
        "image-size": "view.image_size",
        "batch-size": "data.batch_size",
        "workers": "data.workers",
        "resume": "run.resume",
    }

    models: tuple[str, ...] = Field(min_length=1, description="models to probe; may be repeated")
    names: tuple[str, ...] = Field((), description="what to call them, once for each model")
    weights: tuple[str, ...] = Field(
        ("hub",), description="hub, random or a file; once, or once for each model"
    )
    data: DiskCachedDataConfig
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (1, 2, 3), min_length=1, description="seeds: of label budget, choice, order and crops"
    )
    probe: ProbeConfig = ProbeConfig()
    view: ProbeViewConfig = ProbeViewConfig()
    schedule: ScheduleConfig = Field(
        ScheduleConfig(warmup=1 / 9, start_ratio=0.0, final_ratio=0.0),
        description="of the online style; 90 epochs by default, 10 of them for warm-up",
    )
    run: RunConfig

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds must differ from each other: {','.join(map(str, seeds))}")
        return seeds
