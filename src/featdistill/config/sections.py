"""The sections that configurations are made of; each default stands here and nowhere else.

Importing this file must stay cheap: `featdistill COMMAND --help` reads it and nothing heavier.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Immutable, and unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Target(StrEnum):
    """What of the teacher the student learns."""

    MAP = "map"
    GAP = "gap"
    POOLED = "pooled"
    LOGITS = "logits"


class Whitening(StrEnum):
    """How the teacher's features are normalised before the loss."""

    LAYERNORM = "layernorm"
    NONE = "none"
    L2 = "l2"
    STANDARDIZE = "standardize"
    PCA = "pca"


class Distance(StrEnum):
    """How far the student's features are from the target."""

    SMOOTH_L1 = "smooth-l1"
    MSE = "mse"
    L1 = "l1"
    COSINE = "cosine"


class Position(StrEnum):
    """How a ViT student knows where a token is."""

    SHARED_RPB = "shared-rpb"
    RPB = "rpb"
    APE = "ape"
    NONE = "none"


class Pool(StrEnum):
    """How a map and its prefix become one vector."""

    MEAN = "mean"
    CLS = "cls"
    MODEL = "model"


class Head(StrEnum):
    """What becomes of a classifier that the model brings along."""

    AUTO = "auto"
    KEEP = "keep"
    FRESH = "fresh"


class Precision(StrEnum):
    """Arithmetic of the training step."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BF16 = "bf16"


class ModelConfig(Section):
    """One model to use, and what its checkpoint file does not say itself."""

    spec: str = Field(
        description="timm/NAME, a checkpoint file, a run or export folder, hf-hub:NAME, or "
        "package.module:factory"
    )
    weights: str = Field("hub", description="of timm/NAME: hub, random, or a checkpoint file")
    arch: str | None = Field(
        None, description="timm's name of a checkpoint file's architecture, if it asks for it"
    )
    branch: str | None = Field(
        None,
        description="part of a checkpoint file to take: student, teacher, model_ema, ...; the "
        "teacher or the only one by default",
    )
    normalisation: Literal["auto", "imagenet", "clip", "half", "satellite"] = Field(
        "auto",
        description="mean and std for a checkpoint file: imagenet, clip, half (0.5) or satellite "
        "(DINOv3's)",
    )
    bias_resampling: Literal["linear", "geometric"] = Field(
        "linear", description="relative bias tables at another image size: linear or geometric"
    )


class TeacherConfig(ModelConfig):
    """The frozen model to learn from."""

    image_size: Positive | None = Field(
        None, description="side in pixels at which the teacher sees the view; its own by default"
    )
    layer: int | Literal["auto", "last"] = Field(
        "auto",
        description="layer or stage of the target map; auto: the last, or the stage of a "
        "hierarchical teacher whose grid is the student's",
    )
    drop_path: Rate = Field(0.0, description="stochastic depth rate in the teacher")
    precision: Precision = Field(
        Precision.AUTO, description="of its pass: float32 or bf16; auto: the run's"
    )


class TeacherCacheConfig(Section):
    """What the teacher says, kept on disk: views then repeat, and the teacher speaks only once."""

    folder: str | None = Field(
        None,
        description="keep what the teacher says in this folder, and take it from there; views then "
        "repeat (see docs/teacher-cache.md)",
    )
    views: Positive | None = Field(
        None, description="fixed views of each image in the cache, 4 by default"
    )
    seed: Annotated[int, Field(ge=0)] | None = Field(
        None, description="seed of the fixed views; the run's by default"
    )

    @model_validator(mode="before")
    @classmethod
    def _views(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("folder") and values.get("views") is None:
            return {**values, "views": 4}
        return values

    @model_validator(mode="after")
    def _used(self) -> TeacherCacheConfig:
        if self.folder is None and (self.views is not None or self.seed is not None):
            raise ValueError("views and seed are of no use without a folder (--teacher-cache)")
        return self


class StudentConfig(Section):
    """The model to make."""

    name: str | tuple[str, ...] = Field(
        "vit-b",
        description="vit-t/s/b/l, swin-t/s/b/g, or timm/NAME; several learn from one pass of the "
        "teacher, each in a folder of its name",
    )
    patch: Positive | None = Field(
        None, description="patch side in pixels; 16 (vit-l 14, swin 4) by default"
    )
    position: Position | None = Field(
        None,
        description="shared-rpb, rpb, ape or none (ViT students only); shared-rpb by default, "
        "but a student that continues from a model keeps that model's",
    )
    init: str = Field("random", description="random, teacher, or a model to continue from")
    drop_path: Rate = Field(0.1, description="stochastic depth rate, growing linearly with depth")
    drop_path_way: Literal["multiply", "skip"] = Field(
        "multiply",
        description="multiply a dropped branch by zero, or skip its computation (ViT, BEiT, Swin "
        "V2): then a fixed number of a micro-batch's images is dropped, not a random one",
    )
    width: Positive | None = Field(None, description="channels, instead of the named size's")
    depth: Positive | None = Field(None, description="layers, instead of the named size's")
    heads: Positive | None = Field(None, description="heads, instead of the named size's")
    window: Positive | None = Field(None, description="Swin window; 7 (swin-b, -g: 14) by default")
    init_std: float | None = Field(
        None,
        gt=0,
        description="std of a ViT's random weights; the official 0.02 by default, "
        "more below a width of 768",
    )

    @field_validator("name", mode="before")
    @classmethod
    def _one_is_no_list(cls, value: object) -> object:
        if isinstance(value, list | tuple) and len(value) == 1:
            return value[0]
        if isinstance(value, list | tuple) and not value:
            raise ValueError("no student is named")
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """All students."""
        return (self.name,) if isinstance(self.name, str) else self.name


class NewModelConfig(Section):
    """A model to pre-train from nothing: a plain ViT (absolute positions), or a Swin."""

    name: str = Field("vit-s", description="vit-t/s/b/l, swin-t/s/b/g, or timm/NAME")
    patch: Positive | None = Field(
        None, description="patch side in pixels; 16 (vit-l 14, swin 4) by default"
    )
    drop_path: Rate = Field(0.0, description="stochastic depth rate, growing linearly with depth")
    width: Positive | None = Field(None, description="channels, instead of the named size's")
    depth: Positive | None = Field(None, description="layers, instead of the named size's")
    heads: Positive | None = Field(None, description="heads, instead of the named size's")
    window: Positive | None = Field(None, description="Swin window; 7 (swin-b, -g: 14) by default")


BadImages = Literal["skip", "error"]


def tolerated(policy: BadImages, limit: float) -> float:
    """The share of images that may be unreadable."""
    return 0.0 if policy == "error" else limit


class DataConfig(Section):
    """Which images, and how they are read."""

    path: str = Field(
        description="image folder, list file (.txt .csv), parquet file or folder, digits, "
        "scattered-digits, hf:NAME, or torchvision:NAME (cifar10, ...)"
    )
    val: str | None = Field(None, description="validation data, if not a part of the data")
    val_fraction: float | None = Field(
        None, gt=0, lt=1, description="share of the training part to hold out for validation"
    )
    labels: str | None = Field(
        None, description="label budget: N (or N/class) images a class, or P% of each; seeded"
    )
    batch_size: Positive = Field(256, description="global batch, over all processes")
    workers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="loading processes; chosen from the cores by default"
    )
    decode: Literal["exact", "fast"] = Field(
        "exact",
        description="exact, or fast: large JPEG pictures are read at a half, a quarter or an "
        "eighth of their size where a crop needs no more",
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

    @model_validator(mode="after")
    def _one_validation(self) -> DataConfig:
        if self.val is not None and self.val_fraction is not None:
            raise ValueError("give either val-data or val-fraction, not both")
        return self


class CachedDataConfig(DataConfig):
    """Which images, how they are read, and where they are kept once they are decoded."""

    cache: Literal["none", "device", "disk"] = Field(
        "none",
        description="where decoded training images are kept: device (small sets: views are cut "
        "there), disk (scored images too), or none",
    )
    cache_folder: str | None = Field(
        None, description="of --data.cache disk; ~/.cache/featdistill/decoded by default"
    )
    cache_short_side: Positive | None = Field(
        None,
        description="keep larger images at so many pixels on the short side; their views then "
        "are of fewer pixels",
    )

    @model_validator(mode="after")
    def _a_cache(self) -> CachedDataConfig:
        if self.cache != "none" and self.decode == "fast":
            raise ValueError("decode fast reads no whole images, which a cache keeps; give exact")
        if self.cache == "none" and self.cache_short_side is not None:
            raise ValueError("cache_short_side is of --data.cache device or disk; give one of them")
        if self.cache != "disk" and self.cache_folder is not None:
            raise ValueError("cache_folder is of --data.cache disk; give that too")
        return self


class DiskCachedDataConfig(CachedDataConfig):
    """Likewise, for a command that looks at several parts of the images: on disk alone."""

    @field_validator("cache")
    @classmethod
    def _on_disk(cls, cache: str) -> str:
        if cache == "device":
            raise ValueError("device is for distill and finetune; give disk")
        return cache


class CropConfig(Section):
    """A random crop and mirroring."""

    crop_scale: tuple[float, float] = Field((0.08, 1.0), description="area of the random crop")
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="aspect of the crop")
    flip: bool = Field(True, description="mirror half of the views")

    @model_validator(mode="after")
    def _ordered(self) -> CropConfig:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two numbers, 0 < low <= high, not {low},{high}")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale cannot exceed 1 (the whole image): {self.crop_scale[1]}")
        return self


class ViewConfig(CropConfig):
    """How an image becomes the one view that both models see."""

    image_size: Positive = Field(224, description="side in pixels that the student sees")


class FinetuneViewConfig(CropConfig):
    """Training views for classification."""

    image_size: Positive | None = Field(
        None, description="side in pixels; the model's own (compare: the student's) by default"
    )
    randaugment: str | None = Field(
        "rand-m9-mstd0.5-inc1", description="timm's RandAugment specification, or none"
    )
    erasing: Rate = Field(0.25, description="probability of random erasing (pixel noise)")
    eval_crop: float = Field(0.875, gt=0, le=1, description="share of the side kept when scoring")


class ContrastiveViewConfig(ViewConfig):
    """Two views of each image for contrastive pre-training."""

    crop_scale: tuple[float, float] = Field((0.2, 1.0), description="area of the random crop")
    rotate: float = Field(0.0, ge=0, le=180, description="largest random rotation, degrees")
    brightness: float = Field(0.4, ge=0, le=1, description="colour jitter: +- share")
    contrast: float = Field(0.4, ge=0, le=1, description="colour jitter: +- share")
    saturation: float = Field(0.4, ge=0, le=1, description="colour jitter: +- share")
    hue: float = Field(0.1, ge=0, le=0.5, description="colour jitter: +- turns of the colour wheel")
    gray: float = Field(0.2, ge=0, le=1, description="probability of a grey view")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a blurred view")


class ObjectiveConfig(Section):
    """What is compared, after which normalisation, by which distance."""

    target: Target = Field(
        Target.MAP,
        description="map (all tokens), gap (their mean), pooled (as the teacher pools: CLIP's "
        "embedding) or logits",
    )
    whitening: Whitening = Field(
        Whitening.LAYERNORM, description="layernorm, none, l2, standardize or pca"
    )
    loss: Distance = Field(Distance.SMOOTH_L1, description="smooth-l1, mse, l1 or cosine")
    beta: float = Field(2.0, gt=0, description="where smooth-l1 turns from square to line")
    resample: Literal["before-whitening", "after-whitening"] = Field(
        "before-whitening", description="when a teacher's map is carried to the student's grid"
    )
    calibration_images: Positive = Field(
        2048, description="images for the statistics of standardize and pca"
    )


class ContrastiveConfig(Section):
    """SimCLR: NT-Xent on two views (Chen et al. 2020)."""

    temperature: float = Field(0.2, gt=0, description="temperature of NT-Xent")
    projection: Positive = Field(128, description="channels of the projection")
    hidden: Positive = Field(512, description="channels of the projection head's hidden layer")


class MixConfig(Section):
    """Mixing of pairs of training images and their labels."""

    mixup: float = Field(0.8, ge=0, description="mixup's alpha; 0: off")
    cutmix: float = Field(1.0, ge=0, description="cutmix's alpha; 0: off")
    probability: float = Field(1.0, ge=0, le=1, description="share of the batches to mix")
    switch: float = Field(0.5, ge=0, le=1, description="share of cutmix where both are on")
    smoothing: Rate = Field(0.1, description="label smoothing")


class KnnConfig(Section):
    """Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018)."""

    k: tuple[Positive, ...] = Field((1, 5, 10, 20, 100), description="neighbours, one score each")
    temperature: float = Field(0.07, gt=0, description="temperature of the votes")
    pool: Pool = Field(Pool.MEAN, description="mean of the map, cls, or as the model pools")
