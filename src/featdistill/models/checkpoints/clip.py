"""CLIP's image tower, as OpenAI and open_clip write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.models.checkpoints import families
from featdistill.models.checkpoints.reasons import TEXT, TEXT_TOWER
from featdistill.models.checkpoints.spec import CLIP_MEAN, CLIP_STD, Format, Settings
from featdistill.models.checkpoints.tables import Converted, Rule
from featdistill.models.checkpoints.unwrap import Unwrapped


def _row(value: Tensor) -> Tensor:
    return value[None]


def _token(value: Tensor) -> Tensor:
    return value[None, None]


def _transposed(value: Tensor) -> Tensor:
    return value.T if value.ndim == 2 else value  # misshapen ones are named by strict loading


_CLIP = (
    Rule("visual.conv1.weight", "patch_embed.proj.weight"),
    Rule("visual.class_embedding", "cls_token", change=_token),
    Rule("visual.positional_embedding", "pos_embed", change=_row),
    Rule("visual.ln_pre.*", "norm_pre.*"),
    Rule("visual.transformer.resblocks.#.ln_1.*", "blocks.#.norm1.*"),
    Rule("visual.transformer.resblocks.#.attn.in_proj_weight", "blocks.#.attn.qkv.weight"),
    Rule("visual.transformer.resblocks.#.attn.in_proj_bias", "blocks.#.attn.qkv.bias"),
    Rule("visual.transformer.resblocks.#.attn.out_proj.*", "blocks.#.attn.proj.*"),
    Rule("visual.transformer.resblocks.#.ln_2.*", "blocks.#.norm2.*"),
    Rule("visual.transformer.resblocks.#.mlp.c_fc.*", "blocks.#.mlp.fc1.*"),
    Rule("visual.transformer.resblocks.#.mlp.c_proj.*", "blocks.#.mlp.fc2.*"),
    Rule("visual.ln_post.*", "norm.*"),
    Rule("visual.proj", "head.weight", change=_transposed),
    *(Rule(pattern, None, TEXT) for pattern in TEXT_TOWER),
)


def clip_arguments(
    source: Mapping[str, Tensor], tensors: Mapping[str, Tensor], settings: Settings
) -> dict[str, Any]:
    """QuickGELU or GELU: the one thing about a CLIP that no tensor shows.

    OpenAI trained in half precision with QuickGELU. Its files are known by three numbers that only
    they hold, by linear layers in half precision beside norms in single, or, converted since, by
    single-precision weights that are exact in half. What is in half precision throughout may be
    anybody's.
    """
    quick: bool | None = settings.get("quick_gelu")
    assumed: tuple[str, ...] = ()
    if quick is None and _openai(source, tensors):
        quick, assumed = True, ("QuickGELU and CLIP's normalisation, since it looks like OpenAI's",)
    if quick is None:
        raise ModelError(
            "a CLIP whose activation cannot be told from the tensors",
            expected="OpenAI's weights (QuickGELU), or open_clip_config.json beside the file",
            fix="name the architecture beside the file: timm/vit_base_patch16_clip_224 (GELU: "
            "LAION, DataComp) or timm/vit_base_patch16_clip_quickgelu_224 (QuickGELU: OpenAI, "
            "MetaCLIP, DFN), or the like for other sizes",
        )
    size = "quickgelu_224" if quick else "224"
    return {
        "architecture": f"vit_base_patch16_clip_{size}",
        "rgb": (CLIP_MEAN, CLIP_STD),
        "assumed": assumed,
    }


def _openai(source: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    if "input_resolution" in source and "vocab_size" in source:
        return True
    linear = [v for n, v in tensors.items() if n.endswith("mlp.fc1.weight")]
    norms = [v for n, v in tensors.items() if n.endswith("norm1.weight")]
    if not linear or any(v.dtype != torch.float32 for v in norms):
        return False
    return all(torch.equal(v.float(), v.half().float()) for v in linear)


def _clip_hints(unwrapped: Unwrapped, converted: Converted, settings: Settings) -> dict[str, Any]:
    image, text = (unwrapped.tensors.get(n) for n in ("visual.proj", "text_projection"))
    if image is not None and text is not None and image.shape[-1:] != text.shape[-1:]:
        shapes = f"visual.proj {tuple(image.shape)}, text_projection {tuple(text.shape)}"
        raise ModelError(f"the projections do not end in one space ({shapes})")
    return clip_arguments(unwrapped.tensors, converted.tensors, settings)


def unbiased_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's head has a bias; CLIP's projection has none."""
    weight = tensors.get("head.weight")
    if weight is None or weight.ndim != 2:
        return tensors
    return {**tensors, "head.bias": torch.zeros(len(weight))}


CLIP = Format(
    name="clip",
    title="CLIP, as OpenAI and open_clip write it",
    marks=("visual.transformer.resblocks.#.attn.in_proj_weight",),
    rules=_CLIP,
    plan=families.vision_transformer,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    normalisation_known=False,
    hints=_clip_hints,
    finish=unbiased_head,
    required=("visual.proj",),
)
