"""The schema of `segment`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from featdistill.config.commands.base import EXTEND, RUN, TRAIN, Command
from featdistill.config.sections import BadImages, ModelConfig, Positive, Rate, Section, tolerated
from featdistill.config.training import OptimizerConfig, PolynomialScheduleConfig, TrainRunConfig


class SegmentDataConfig(Section):
    """Which images and masks, and what the masks' values mean."""

    path: str | None = Field(
        None,
        description="folder in ADE20K's, Cityscapes' or VOC's layout or with --images and --masks, "
        "parquet file or folder, saved data set, or hf:NAME",
    )
    layout: Literal["auto", "ade20k", "cityscapes", "voc", "table"] = Field(
        "auto", description="auto, ade20k, cityscapes, voc or table"
    )
    images: str | None = Field(
        None, description="pattern of image files below the folder: 'photos/{part}/*.jpg'"
    )
    masks: str | None = Field(
        None, description="pattern of their masks: 'masks/{part}/*.png'; the stars pair them"
    )
    classes: str | None = Field(
        None,
        description="how many, a file with a name a line, or ade20k, cityscapes, voc; by default "
        "what the data say (classes.txt)",
    )
    first_class: Annotated[int, Field(ge=0)] | None = Field(
        None, description="a mask's value for the first class; ade20k: 1, else 0"
    )
    unlabelled: tuple[Annotated[int, Field(ge=0, lt=65536)], ...] | None = Field(
        None, description="values that mean no class; ade20k: 0, else 255"
    )
    val_fraction: float | None = Field(
        None, gt=0, lt=1, description="share of the training part to hold out for validation"
    )
    batch_size: Positive = Field(16, description="global batch, over all processes")
    workers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="loading processes; chosen from the cores by default"
    )
    bad_images: BadImages = Field(
        "skip", description="skip: another image takes an unreadable one's place; error: stop"
    )
    bad_image_limit: float = Field(
        0.01, ge=0, le=1, description="share of unreadable images at which the run stops"
    )

    @property
    def tolerated(self) -> float:
        """The share of images that may be unreadable."""
        return tolerated(self.bad_images, self.bad_image_limit)


class SegmentViewConfig(Section):
    """Crops of image and mask for training."""

    image_size: Positive = Field(512, description="side of the crop in pixels; also the window")
    image_width: Positive | None = Field(
        None, description="width of the crop, where it is not square"
    )
    short_side: Positive | None = Field(
        None,
        description="short side of a whole image at scale 1, in pixels; the crop's by default",
    )
    scale: tuple[float, float] = Field((0.5, 2.0), description="random scale of the image")
    largest: float = Field(
        0.75, gt=0, le=1, description="share of a crop that one class may fill (ten tries)"
    )
    flip: bool = Field(True, description="mirror half of the views")
    colour: float = Field(0.5, ge=0, le=1, description="probability of each photometric distortion")

    @field_validator("scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be two numbers, 0 < low <= high, not {scale}")
        return scale

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the crop."""
        return self.image_size, self.image_width or self.image_size

    @property
    def short(self) -> int:
        """The short side of a whole image at scale 1."""
        return self.short_side or min(self.size)


class SegmentHeadConfig(Section):
    """What is put on the backbone."""

    kind: Literal["upernet", "linear"] = Field("upernet", description="upernet or linear")
    channels: Positive | None = Field(
        None, description="UperNet's; 512, or a plain ViT's own width, by default"
    )
    layers: tuple[int, ...] | None = Field(
        None,
        description="four layers for UperNet, from 0; equally spaced ones, or the stages, by "
        "default",
    )
    auxiliary: Annotated[int, Field(ge=0)] = Field(
        256, description="channels of the auxiliary head beside UperNet; 0: none"
    )
    auxiliary_weight: float = Field(0.4, ge=0, description="of the auxiliary head's loss")
    dropout: Rate = Field(0.1, description="share of channels dropped before a classifier")


class SegmentTestConfig(Section):
    """How a whole image is predicted."""

    mode: Literal["sliding", "whole"] = Field(
        "sliding", description="sliding windows of the crop's size, or the whole image at once"
    )
    stride: float = Field(
        2 / 3, gt=0, le=1, description="from window to window, as a share of the window"
    )
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,), min_length=1, description="sizes whose predictions are averaged: 0.5,0.75,1,1.25"
    )
    flip: bool = Field(False, description="average with the mirror image's prediction")
    windows: Positive = Field(8, description="windows that pass the model together")


class SegmentOptimizerConfig(OptimizerConfig):
    """AdamW with layer decay."""

    lr_per_512: float = Field(3.2e-3, gt=0, description="peak rate for each 512 images of batch")
    clip: float | None = Field(None, gt=0, description="largest gradient norm, or none")
    layer_decay: float = Field(0.65, gt=0, le=1, description="each layer's rate over the next's")


class SegmentConfig(Command):
    """Train, score and use a segmenter on any backbone."""

    summary = "train a segmenter on a backbone, score it, and predict masks"
    example = "featdistill segment --model runs/distilled --data ADE20K --out runs/segmented"
    flat = {
        "model": "model.spec",
        "weights": "model.weights",
        "arch": "model.arch",
        "data": "data.path",
        "images": "data.images",
        "masks": "data.masks",
        "classes": "data.classes",
        "val-fraction": "data.val_fraction",
        "predict": "predict",
        "train": "train",
        **RUN,
        **TRAIN,
        **EXTEND,
        "head": "head.kind",
        "layer-decay": "optimizer.layer_decay",
        "drop-path": "drop_path",
        "scales": "test.scales",
        "flip": "test.flip",
        "ema": "ema",
    }

    model: ModelConfig
    data: SegmentDataConfig = SegmentDataConfig()
    predict: str | None = Field(
        None, description="images to predict masks for, with a trained segmenter as model"
    )
    train: Literal["all", "head", "none"] = Field(
        "all", description="what learns: all, the head alone, or none: score a trained segmenter"
    )
    view: SegmentViewConfig = SegmentViewConfig()
    head: SegmentHeadConfig = SegmentHeadConfig()
    test: SegmentTestConfig = SegmentTestConfig()
    drop_path: Rate = Field(0.1, description="stochastic depth rate")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of averaged weights, scored beside the others, or none"
    )
    optimizer: SegmentOptimizerConfig = SegmentOptimizerConfig()
    schedule: PolynomialScheduleConfig = PolynomialScheduleConfig(steps=160_000)
    run: TrainRunConfig

    @model_validator(mode="after")
    def _one_task(self) -> SegmentConfig:
        if self.predict is None and self.data.path is None:
            raise ValueError("--data is required: images and masks (or --predict IMAGES)")
        if self.predict is not None and self.data.path is not None:
            raise ValueError("give either --data (to train or score) or --predict, not both")
        return self
