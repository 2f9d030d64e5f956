"""Students: timm architectures by short name, initialised as the official code does.

ViT students are timm's `Beit` (layer scale 0.1, query and value bias, CLS token) with one relative
position bias table for all layers; Swin students are timm's `SwinTransformerV2`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from featdistill.core.errors import ModelError
from featdistill.core.seeds import seeded_globals
from featdistill.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    Origin,
    Rgb,
    TimmBuild,
)
from featdistill.models.student_sizes import SIZES, SwinSize, VitSize, check_student
from featdistill.models.timm_models import accepts, check_name, create, drop_path_argument

PositionName = Literal["shared-rpb", "rpb", "ape", "none"]
Style = Literal["beit", "plain"]


def build_student(
    name: str,
    *,
    image_size: int,
    patch: int | None = None,
    position: PositionName | None = None,
    drop_path: float = 0.0,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    window: int | None = None,
    style: Style = "beit",
    init_std: float | None = None,
    seed: int = 0,
    mean: Rgb = IMAGENET_MEAN,
    std: Rgb = IMAGENET_STD,
) -> Backbone:
    """A student with random weights, a pure function of the seed.

    Args:
        name: a key of `SIZES`, or `timm/NAME`.
        image_size: side in pixels.
        patch: side of a patch in pixels.
        position: position scheme of a ViT; `shared-rpb` if None.
        width, depth, heads: instead of the named size's (ViT).
        window: Swin's window side.
        style: `plain` makes a ViT as DINO's and DeiT's (absolute positions, no layer scale), which
            is what a teacher is pre-trained as.
        init_std: of a ViT's random weights; see `initialise`.

    Raises:
        ModelError: no such student, or sizes that do not go together.
    """
    build = _student_build(name, image_size, patch, position, width, depth, heads, window, style)
    return build_fresh(
        build,
        spec=name,
        drop_path=drop_path,
        init_std=init_std,
        seed=seed,
        mean=mean,
        std=std,
        image_size=image_size,
    )


def build_fresh(
    build: TimmBuild,
    *,
    spec: str,
    drop_path: float = 0.0,
    init_std: float | None = None,
    seed: int = 0,
    mean: Rgb = IMAGENET_MEAN,
    std: Rgb = IMAGENET_STD,
    image_size: int | None = None,
) -> Backbone:
    """A model with random weights, a pure function of the seed."""
    rate = drop_path_argument(build.architecture, drop_path)
    with seeded_globals("model", seed):
        model = create(build.architecture, **rate, **build.arguments)
        initialise(model, init_std)
    size = build.arguments.get("img_size") or image_size or 224
    return Backbone(
        model,
        mean=mean,
        std=std,
        image_size=(size, size),
        origin=Origin(spec=spec, weights=f"random (seed {seed})"),
        build=build,
        fixed_size="img_size" in build.arguments,
    )


def _student_build(
    name: str,
    image_size: int,
    patch: int | None,
    position: PositionName | None,
    width: int | None,
    depth: int | None,
    heads: int | None,
    window: int | None,
    style: Style,
) -> TimmBuild:
    shape = {"width": width, "depth": depth, "heads": heads}
    if name.startswith("timm/"):
        _refuse({**shape, "patch": patch, "position": position, "window": window}, name)
        return _timm_build(name.removeprefix("timm/"), image_size)
    check_student(name)
    size = SIZES[name]
    if isinstance(size, SwinSize):
        _refuse({**shape, "position": position}, name)
        return swin_build(size, image_size, patch or size.patch, window or size.window)
    _refuse({"window": window}, name)
    width = width or size.width
    chosen = VitSize(
        width,
        depth or size.depth,
        heads or (width // 64 if width % 64 == 0 else size.heads),  # 64 channels a head
        patch or size.patch,
    )
    if style == "plain":
        return plain_vit_build(chosen, image_size)
    return vit_build(chosen, image_size, position or "shared-rpb")


def _refuse(options: dict[str, Any], name: str) -> None:
    given = [key for key, value in options.items() if value is not None]
    if given:
        what = {"position": "a Swin student keeps its own continuous position bias"}
        reason = (
            what[given[0]] if given[0] in what and name.startswith("swin") else "it has its own"
        )
        raise ModelError(
            f"student '{name}' takes no {', '.join(given)}: {reason}", fix="leave it out"
        )


def vit_build(size: VitSize, image_size: int, position: PositionName) -> TimmBuild:
    """A BEiT-style ViT as timm builds it, with every argument that differs from timm's default."""
    if image_size % size.patch:
        low = image_size // size.patch * size.patch
        near = ", ".join(str(n) for n in (low, low + size.patch) if n)
        raise ModelError(
            f"a patch of {size.patch} pixels does not divide an image of {image_size}",
            fix=f"give --image-size {near.replace(', ', ' or ')}, or another --student-patch",
        )
    if size.width % size.heads:
        raise ModelError(
            f"{size.heads} heads do not divide a width of {size.width}", fix="give --student.heads"
        )
    return TimmBuild(
        "beit_base_patch16_224",
        {
            "img_size": image_size,
            "patch_size": size.patch,
            "embed_dim": size.width,
            "depth": size.depth,
            "num_heads": size.heads,
            "init_values": 0.1,
            "use_abs_pos_emb": position == "ape",
            "use_rel_pos_bias": position == "rpb",
            "use_shared_rel_pos_bias": position == "shared-rpb",
            "num_classes": 0,
            "global_pool": "token",  # with 'avg' timm's Beit has no final norm
        },
    )


def plain_vit_build(size: VitSize, image_size: int) -> TimmBuild:
    """A ViT with absolute positions and nothing else, as timm builds it."""
    shared = vit_build(size, image_size, "ape").arguments  # the same checks, the same sizes
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    arguments = {name: shared[name] for name in names}
    return TimmBuild("vit_base_patch16_224", {**arguments, "global_pool": "token"})


def swin_build(size: SwinSize, image_size: int, patch: int, window: int) -> TimmBuild:
    """A Swin V2 as timm builds it."""
    if image_size % (patch * 8):
        low = image_size // (patch * 8) * patch * 8
        near = " or ".join(str(n) for n in (low, low + patch * 8) if n)
        raise ModelError(
            f"an image of {image_size} pixels is not a whole number of patches of {patch} at every "
            "stage of a Swin",
            fix=f"give --image-size {near}",
        )
    extra = {"end_norm_period": size.end_norm_period} if size.end_norm_period else {}
    return TimmBuild(
        "swinv2_tiny_window8_256",
        {
            **extra,
            "img_size": image_size,
            "patch_size": patch,
            "embed_dim": size.width,
            "depths": size.depths,
            "num_heads": size.heads,
            "window_size": min(window, image_size // patch),
            "num_classes": 0,
            "global_pool": "avg",
        },
    )


def _timm_build(name: str, image_size: int) -> TimmBuild:
    check_name(name)
    arguments: dict[str, Any] = {"num_classes": 0}
    if accepts(name, "img_size"):
        arguments["img_size"] = image_size
    return TimmBuild(name.partition(".")[0], arguments)


@torch.no_grad()
def initialise(model: Any, std: float | None = None) -> None:
    """The official initialisation, where timm's differs.

    ViT: truncated normal of std 0.02 cut at one std, residual projections of layer l divided by
    sqrt(2 l). Swin V2: the norms that end a residual branch start at 1e-5 instead of 0.
    Source: SwinTransformer/Feature-Distillation, models/vision_transformer.py and
    models/swin_transformer_v2.py. A ViT narrower than the official 768 channels gets a std that
    grows as 1/sqrt(width), or its layers would hardly pass a signal (docs/lab-notes.md).
    """
    if isinstance(model, Beit | VisionTransformer):
        std = std or 0.02 * max(1.0, (768 / model.embed_dim) ** 0.5)
        cut = std if isinstance(model, Beit) else 2 * std
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=std, a=-cut, b=cut)
    if isinstance(model, Beit):
        for token in (model.cls_token, model.pos_embed):
            if token is not None:
                trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
        model.fix_init_weight()
    elif isinstance(model, SwinTransformerV2):
        for stage in model.layers:
            for block in stage.blocks:
                for norm in (block.norm1, block.norm2):
                    nn.init.constant_(norm.weight, 1e-5)
                    nn.init.constant_(norm.bias, 1e-5)
