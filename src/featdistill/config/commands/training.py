"""The schemas of `pretrain` and `finetune`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from featdistill.config.commands.base import (
    DATA,
    EXTEND,
    RUN,
    TRAIN,
    Command,
)
from featdistill.config.sections import (
    CachedDataConfig,
    ContrastiveConfig,
    ContrastiveViewConfig,
    FinetuneViewConfig,
    Head,
    MixConfig,
    ModelConfig,
    NewModelConfig,
    Pool,
    Rate,
)
from featdistill.config.training import (
    FinetuneOptimizerConfig,
    FinetuneScheduleConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainRunConfig,
)


class PretrainConfig(Command):
    """Make a teacher where none can be downloaded: SimCLR."""

    summary = "make a contrastive teacher from your own images (SimCLR)"
    example = "featdistill pretrain --model vit-s --data IMAGES --epochs 100 --out runs/teacher"
    flat = {
        "model": "model.name",
        "model-patch": "model.patch",
        "drop-path": "model.drop_path",
        **DATA,
        **RUN,
        **TRAIN,
        **EXTEND,
        "temperature": "objective.temperature",
    }

    model: NewModelConfig = NewModelConfig()
    data: CachedDataConfig
    view: ContrastiveViewConfig = ContrastiveViewConfig()
    objective: ContrastiveConfig = ContrastiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr_per_512=1e-3)
    schedule: ScheduleConfig = ScheduleConfig(epochs=100, warmup=0.1)
    run: TrainRunConfig

    @model_validator(mode="after")
    def _cut_where(self) -> PretrainConfig:
        if self.data.cache == "device":
            raise ValueError(
                "--data.cache device cannot cut SimCLR's views (colour, blur); give --data.cache "
                "disk"
            )
        return self


class FinetuneConfig(Command):
    """Fine-tune a backbone for classification."""

    summary = "fine-tune a backbone for classification"
    example = "featdistill finetune --model runs/distilled --data LABELLED --out runs/finetuned"
    flat = {
        "model": "model.spec",
        "weights": "model.weights",
        "arch": "model.arch",
        **DATA,
        "labels": "data.labels",
        **RUN,
        **TRAIN,
        **EXTEND,
        "layer-decay": "optimizer.layer_decay",
        "drop-path": "drop_path",
        "pool": "pool",
        "head": "head",
        "ema": "ema",
    }

    model: ModelConfig
    data: CachedDataConfig
    view: FinetuneViewConfig = FinetuneViewConfig()
    mix: MixConfig = MixConfig()
    pool: Literal[Pool.MEAN, Pool.CLS] = Field(
        Pool.MEAN, description="vector given to the classifier: mean of the map, or cls"
    )
    head: Head = Field(
        Head.AUTO,
        description="keep the model's classifier (with its own norm and pooling), fresh, or auto: "
        "keep it if it names the same classes",
    )
    drop_path: Rate = Field(0.1, description="stochastic depth rate")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of averaged weights, scored and exported beside the others, or none",
    )
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    schedule: FinetuneScheduleConfig = FinetuneScheduleConfig(epochs=100)
    run: TrainRunConfig

    @model_validator(mode="after")
    def _cut_where(self) -> FinetuneConfig:
        if self.data.cache == "device" and self.view.randaugment is not None:
            raise ValueError(
                "--data.cache device cannot cut views with RandAugment; give --data.cache disk, or "
                "--view.randaugment none"
            )
        return self
