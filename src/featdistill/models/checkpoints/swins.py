"""Swin and Swin V2: Microsoft's, EsViT's, feature distillation's, timm's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

from featdistill.models.checkpoints import families
from featdistill.models.checkpoints.reasons import HEAD, MASK
from featdistill.models.checkpoints.spec import Format, Settings, same
from featdistill.models.checkpoints.tables import Converted, Rule
from featdistill.models.checkpoints.unwrap import Unwrapped

_BUFFERS = tuple(
    Rule(f"layers.#.blocks.#.{name}", f"layers.#.blocks.#.{name}", buffer=True)
    for name in ("attn_mask", "attn.relative_position_index", "attn.relative_coords_table")
)
_SWIN_BODY = (
    *_BUFFERS,
    Rule("mask_token", None, MASK),
    Rule("head.mlp.*", None, HEAD),
    Rule("head.last_layer*", None, HEAD),
    Rule("head_dense.*", None, HEAD),
    *same("patch_embed.proj.*", "patch_embed.norm.*"),
    *same("layers.#.blocks.#.norm1.*", "layers.#.blocks.#.norm2.*"),
    *same("layers.#.blocks.#.mlp.fc1.*", "layers.#.blocks.#.mlp.fc2.*"),
    *same("layers.#.blocks.#.attn.qkv.*", "layers.#.blocks.#.attn.proj.*"),
    *same("norm.*"),
)
# Microsoft's Swin downsamples at the end of a stage, timm's at the beginning of the next
_MICROSOFT = (
    Rule("layers.#.downsample.*", "layers.#+1.downsample.*"),
    Rule("head.weight", "head.fc.weight"),
    Rule("head.bias", "head.fc.bias"),
)
_TIMM = same("layers.#.downsample.*", "head.fc.weight", "head.fc.bias")
_SWIN_V1 = (*_SWIN_BODY, *same("layers.#.blocks.#.attn.relative_position_bias_table"))
_SWIN_V2 = (
    *_SWIN_BODY,
    Rule("layers.#.blocks.#.attn.rpe_mlp.*", "layers.#.blocks.#.attn.cpb_mlp.*"),
    # one bias for all blocks of a stage, see `_untie_stages`
    Rule("layers.#.rel_pos_bias.rpe_mlp.*", "layers.#.rel_pos_bias.cpb_mlp.*"),
    *(
        Rule(f"layers.#.rel_pos_bias.{n}", f"layers.#.blocks.0.attn.{n}", buffer=True)
        for n in ("relative_position_index", "relative_coords_table")
    ),
    *same("layers.#.blocks.#.enorm.*"),
    *same("layers.#.blocks.#.attn.cpb_mlp.*", "layers.#.blocks.#.attn.logit_scale"),
    *same("layers.#.blocks.#.attn.q_bias", "layers.#.blocks.#.attn.v_bias"),
)


def _swin_image(converted: Converted) -> dict[str, Any]:
    """The image size, if a shifted window's mask is there to show it: (windows, w^2, w^2)."""
    mask = converted.buffers.get("layers.0.blocks.1.attn_mask")
    kernel = converted.tensors.get("patch_embed.proj.weight")
    if mask is None or mask.ndim != 3 or kernel is None or kernel.ndim != 4:
        return {}
    side = math.isqrt(mask.shape[0]) * math.isqrt(mask.shape[1])
    return {"img_size": side * kernel.shape[-1]}


def _swin_hints(unwrapped: Unwrapped, converted: Converted, _: Settings) -> dict[str, Any]:
    """EsViT's layer norms have an epsilon of 1e-6, Microsoft's Swin torch's 1e-5."""
    self_distilled = any(reason == HEAD for reason in converted.left_out) or any(
        branch in unwrapped.path for branch in ("teacher/", "student/")
    )
    norm = {"norm_eps": 1e-6} if self_distilled else {}
    return norm | _swin_image(converted)


def _swin_v2_hints(_: Unwrapped, converted: Converted, __: Settings) -> dict[str, Any]:
    """Windows and pre-training windows, from the coordinate tables (1, 2w-1, 2w-1, 2)."""
    windows: dict[int, int] = {}
    pretrained: dict[int, int] = {}
    for name, value in converted.buffers.items():
        found = re.fullmatch(r"layers\.(\d+)\.blocks\.\d+\.attn\.relative_coords_table", name)
        if found is None or value.ndim != 4:
            continue
        stage, window = int(found[1]), (value.shape[1] + 1) // 2
        windows.setdefault(stage, window)
        # largest coordinate = log2(8 (w-1) / (p-1) + 1) / log2(8), p the pre-training window
        reach = 2 ** (3 * float(value.max())) - 1
        pretrained.setdefault(stage, round(8 * (window - 1) / reach) + 1)
    if not windows:
        return {}
    order = sorted(windows)
    out: dict[str, Any] = {"windows": [windows[s] for s in order]} | _swin_image(converted)
    if any(pretrained[s] != windows[s] for s in order):
        out["pretrained_window_sizes"] = tuple(pretrained[s] for s in order)
    return out


def _untie_stages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A stage's shared continuous bias, copied into each of its blocks."""
    shared = {n: v for n, v in tensors.items() if ".rel_pos_bias." in n}
    out = {n: v for n, v in tensors.items() if n not in shared}
    for name, value in shared.items():
        stage, rest = name.split(".rel_pos_bias.")
        blocks = {n.split(".")[3] for n in tensors if n.startswith(f"{stage}.blocks.")}
        out |= {f"{stage}.blocks.{block}.attn.{rest}": value.clone() for block in blocks}
    return out


def _tied_name(name: str, tensors: Mapping[str, Tensor]) -> str:
    if not any(".rel_pos_bias." in n for n in tensors):
        return name
    return re.sub(r"\.blocks\.\d+\.attn\.cpb_mlp\.", ".rel_pos_bias.cpb_mlp.", name)


_V1_MARK = "layers.#.blocks.#.attn.relative_position_bias_table"
SWIN = Format(
    name="swin",
    title="Swin, as Microsoft and EsViT write it",
    marks=(_V1_MARK, "layers.0.downsample.*"),
    rules=(*_SWIN_V1, *_MICROSOFT),
    plan=families.swin,
    kind=SwinTransformer,
    hints=_swin_hints,
    pads_first=True,
)
SWIN_TIMM = Format(
    name="swin-timm",
    title="timm's Swin",
    marks=(_V1_MARK,),
    never=("layers.0.downsample.*",),
    rules=(*_SWIN_V1, *_TIMM),
    plan=families.swin,
    kind=SwinTransformer,
)
SWIN_V2 = Format(
    name="swin-v2",
    title="Swin V2, as Microsoft and feature distillation write it",
    finish=_untie_stages,
    unfinish=_tied_name,
    marks=("layers.#.blocks.#.attn.logit_scale", "layers.0.downsample.*"),
    rules=(*_SWIN_V2, *_MICROSOFT),
    plan=families.swin_v2,
    kind=SwinTransformerV2,
    hints=_swin_v2_hints,
    pads_first=True,
)
SWIN_V2_TIMM = Format(
    name="swin-v2-timm",
    title="timm's Swin V2",
    marks=("layers.#.blocks.#.attn.logit_scale",),
    never=("layers.0.downsample.*",),
    rules=(*_SWIN_V2, *_TIMM),
    plan=families.swin_v2,
    kind=SwinTransformerV2,
    hints=_swin_v2_hints,
)
