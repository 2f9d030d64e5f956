"""Vision transformers: plain ones, BEiT's, DINOv3's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from featdistill.models.checkpoints import families
from featdistill.models.checkpoints.clip import clip_arguments
from featdistill.models.checkpoints.reasons import DECODER, HEAD, MASK
from featdistill.models.checkpoints.sizes import width_of
from featdistill.models.checkpoints.spec import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    Format,
    Settings,
    same,
)
from featdistill.models.checkpoints.tables import Converted, Rule
from featdistill.models.checkpoints.unwrap import Unwrapped

# --- plain ViT: DINO, iBOT, DeiT, MAE, DINOv2, and timm's own files --------------------

_DINOV3_MARKS = ("rope_embed.periods", "storage_tokens")
_PLAIN_VIT = (
    Rule("mask_token", None, MASK),
    Rule("masked_embed", None, MASK),
    Rule("decoder_*", None, DECODER),
    Rule("head.mlp.*", None, HEAD),
    Rule("head.last_layer*", None, HEAD),
    Rule("head.prototypes*", None, HEAD),
    Rule("dino_head.*", None, HEAD),
    Rule("ibot_head.*", None, HEAD),
    Rule("register_tokens", "reg_token"),
    Rule("blocks.#.gamma_1", "blocks.#.ls1.gamma"),  # DeiT-III, iBOT
    Rule("blocks.#.gamma_2", "blocks.#.ls2.gamma"),
    Rule("blocks.#.mlp.w12.*", "blocks.#.mlp.fc1.*"),
    Rule("blocks.#.mlp.w3.*", "blocks.#.mlp.fc2.*"),
    *same("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.proj.*"),
    *same("blocks.#.norm1.*", "blocks.#.norm2.*", "blocks.#.ls1.gamma", "blocks.#.ls2.gamma"),
    *same("blocks.#.attn.qkv.*", "blocks.#.attn.proj.*"),
    *same("blocks.#.attn.q_norm.*", "blocks.#.attn.k_norm.*"),
    *same("blocks.#.mlp.fc1.*", "blocks.#.mlp.fc2.*"),
    *same("norm.*", "fc_norm.*", "norm_pre.*", "attn_pool.*"),
    *same("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"),
    Rule("visual.head.proj.*", "head.*"),  # open_clip's, beside a trunk of timm's
)


def fold_class_position(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2 with registers: the CLS position is added to the CLS token; registers have none."""
    positions, cls, registers = (tensors.get(n) for n in ("pos_embed", "cls_token", "reg_token"))
    if positions is None or cls is None or registers is None or positions.ndim != 3:
        return tensors
    side = math.isqrt(max(0, positions.shape[1] - 1))
    if side * side + 1 != positions.shape[1]:
        return tensors  # timm's own, which has been folded
    if cls.shape != positions[:, :1].shape:
        return tensors  # left to the strict loading, which names it
    return {
        **tensors,
        "cls_token": cls + positions[:, :1],
        "pos_embed": positions[:, 1:],
    }


def _vit_hints(unwrapped: Unwrapped, converted: Converted, settings: Settings) -> dict[str, Any]:
    """What is particular to DINOv2's registers, and to image towers of language models."""
    if "register_tokens" in unwrapped.tensors:
        positions = converted.tensors.get("pos_embed")
        rows = positions.shape[1] if positions is not None and positions.ndim == 3 else 0
        if math.isqrt(max(0, rows - 1)) ** 2 != rows - 1:
            raise ModelError(f"1 of another shape (pos_embed with {rows} rows)")
    if architecture := settings.get("timm_model_name"):
        return {
            "architecture": architecture,
            "rgb": (CLIP_MEAN, CLIP_STD),
            **_heads_of(architecture, converted.tensors),
        }
    names = converted.tensors
    if any(name.startswith("norm_pre.") for name in names):
        return clip_arguments(unwrapped.tensors, names, settings)
    if "cls_token" in names:
        trunk = unwrapped.path.endswith("visual.trunk.")  # of open_clip, CLIP's pixels by default
        return {"rgb": (CLIP_MEAN, CLIP_STD)} if trunk else {}
    raise ModelError(
        "1 missing (cls_token)",
        fix="if it has none (SigLIP, and others), its heads and its activation cannot be told from "
        "the tensors: name the architecture beside the file, as timm/vit_base_patch16_siglip_224",
    )


def _heads_of(architecture: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The heads of a named architecture, if the tensors have its width."""
    with torch.device("meta"):
        model: Any = timm.create_model(architecture)
    width = width_of(tensors, r"blocks\.\d+\.norm[12]\.(weight|bias)")
    if getattr(model, "embed_dim", None) != width:
        return {}
    return {"num_heads": model.blocks[0].attn.num_heads}


VIT = Format(
    name="vit",
    title="plain ViT, as DINO, iBOT, DeiT, MAE, DINOv2 and timm write it",
    marks=("blocks.#.attn.qkv.weight", "blocks.#.norm1.weight"),
    never=("blocks.#.attn.q_bias", "rel_pos_bias.*", *_DINOV3_MARKS),
    rules=_PLAIN_VIT,
    plan=families.vision_transformer,
    normalisation_known=False,
    hints=_vit_hints,
    finish=fold_class_position,
)

# --- BEiT-style ViT --------------------

_BEIT = (
    Rule("mask_token", None, MASK),
    Rule("lm_head.*", None, HEAD),
    Rule("cls_pt_layers.*", None, HEAD),
    Rule("lm_head_2.*", None, HEAD),
    Rule(
        "rel_pos_bias.relative_position_index",
        "rel_pos_bias.relative_position_index",
        buffer=True,
    ),
    Rule(
        "blocks.#.attn.relative_position_index",
        "blocks.#.attn.relative_position_index",
        buffer=True,
    ),
    *same("cls_token", "pos_embed", "patch_embed.proj.*"),
    *same("rel_pos_bias.relative_position_bias_table"),
    *same("blocks.#.attn.relative_position_bias_table"),
    *same("blocks.#.norm1.*", "blocks.#.norm2.*", "blocks.#.gamma_1", "blocks.#.gamma_2"),
    *same("blocks.#.attn.qkv.weight", "blocks.#.attn.q_bias", "blocks.#.attn.v_bias"),
    *same("blocks.#.attn.proj.*", "blocks.#.mlp.fc1.*", "blocks.#.mlp.fc2.*"),
    *same("norm.*", "fc_norm.*", "head.weight", "head.bias"),
)


def _beit_hints(unwrapped: Unwrapped, _: Converted, __: Settings) -> dict[str, Any]:
    """Feature distillation's own checkpoints are Beits too, but saw ImageNet's mean and std.

    Its pre-training has the student under `encoder.`; its training script saves `config` and
    `max_accuracy` beside the model, where BEiT's saves `args`.
    """
    if unwrapped.path.endswith("encoder.") or {"config", "max_accuracy"} & set(unwrapped.beside):
        return {"rgb": (IMAGENET_MEAN, IMAGENET_STD)}
    if any(name.startswith("cls_pt_layers.") for name in unwrapped.tensors):
        return {
            "rgb": (IMAGENET_MEAN, IMAGENET_STD),
            "assumed": ("the normalisation, ImageNet's, since it looks like BEiT v2's",),
        }
    return {}


BEIT = Format(
    name="beit",
    title="BEiT-style ViT, as BEiT and feature distillation write it",
    marks=("blocks.#.attn.qkv.weight", "blocks.#.attn.q_bias"),
    never=("storage_tokens",),
    rules=_BEIT,
    plan=families.beit,
    mean=HALF,
    std=HALF,
    normalisation_known=False,
    hints=_beit_hints,
    kind=Beit,
)

# --- DINOv3 --------------------


def _dinov3_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query and value biases out of the joint ones; the keys' are masked out in DINOv3."""
    out = {}
    for name, value in tensors.items():
        if name.endswith("attn.qkv.bias") and value.ndim == 1 and len(value) % 3 == 0:
            query, _, values = value.chunk(3)
            out[name.replace("qkv.bias", "q_bias")] = query
            out[name.replace("qkv.bias", "v_bias")] = values
        elif name != "rope.periods":
            out[name] = value
    return out


def _dinov3_hints(_: Unwrapped, converted: Converted, __: Settings) -> dict[str, Any]:
    periods = converted.tensors.get("rope.periods")
    width = width_of(converted.tensors, r"blocks\.\d+\.norm[12]\.(weight|bias)")
    if (
        periods is None
        or periods.ndim != 1
        or not len(periods)
        or width % (4 * len(periods))
        or not bool((periods.diff() > 0).all())  # as many as a quarter of a head, and growing
    ):
        raise ModelError("1 missing or of another shape (rope.periods)")
    return {"rope_periods": tuple(periods.float().tolist())}


DINOV3 = Format(
    name="dinov3",
    title="DINOv3's ViT",
    marks=("blocks.#.attn.qkv.weight", "blocks.#.ls1.gamma"),
    any_of=_DINOV3_MARKS,
    rules=(
        Rule("mask_token", None, MASK),
        Rule("local_cls_norm.*", None, "the norm of the pre-training's local crops"),
        Rule("blocks.#.attn.qkv.bias_mask", None, "the mask of the key bias, which is zero here"),
        Rule("storage_tokens", "reg_token"),
        Rule("rope_embed.periods", "rope.periods"),
        Rule("blocks.#.ls1.gamma", "blocks.#.gamma_1"),
        Rule("blocks.#.ls2.gamma", "blocks.#.gamma_2"),
        Rule("blocks.#.mlp.w1.*", "blocks.#.mlp.fc1_g.*"),
        Rule("blocks.#.mlp.w2.*", "blocks.#.mlp.fc1_x.*"),
        Rule("blocks.#.mlp.w3.*", "blocks.#.mlp.fc2.*"),
        *same("cls_token", "patch_embed.proj.*", "blocks.#.norm1.*", "blocks.#.norm2.*"),
        *same("blocks.#.attn.qkv.*", "blocks.#.attn.proj.*"),
        *same("blocks.#.mlp.fc1.*", "blocks.#.mlp.fc2.*", "norm.*"),
    ),
    plan=families.eva,
    normalisation_known=False,  # those for satellite images have another
    hints=_dinov3_hints,
    finish=_dinov3_bias,
    unfinish=lambda name, _: re.sub(r"[qv]_bias$", "qkv.bias", name),
    kind=Eva,
)
