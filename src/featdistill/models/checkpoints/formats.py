"""The checkpoint formats: how each is recognised, and its key table.

A format is recognised by names that occur in every block, so that one lost tensor does not turn a
file into another kind of file. The tables are read by `tables.convert`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Rgb
from featdistill.models.checkpoints import families
from featdistill.models.checkpoints.families import Plan
from featdistill.models.checkpoints.sizes import width_of
from featdistill.models.checkpoints.tables import Converted, Rule, any_matches
from featdistill.models.checkpoints.unwrap import Unwrapped

CLIP_MEAN: Rgb = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Rgb = (0.26862954, 0.26130258, 0.27577711)
HALF: Rgb = (0.5, 0.5, 0.5)

# What a checkpoint's surroundings say: settings files beside it
Settings = Mapping[str, Any]
Hints = Callable[[Unwrapped, Converted, Settings], dict[str, Any]]


def _no_hints(_: Unwrapped, __: Converted, ___: Settings) -> dict[str, Any]:
    return {}


def _as_it_is(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def _same_name(name: str, _: Mapping[str, Tensor]) -> str:
    return name


@dataclass(frozen=True)
class Format:
    """One way of writing a family's weights.

    Attributes:
        name: short.
        title: whose files these are.
        marks: patterns that must all occur.
        never: patterns none of which may occur.
        any_of: patterns of which one must occur, if there are any.
        rules: the key table.
        plan: the model from the tensors.
        mean, std: the normalisation that these models were trained with.
        normalisation_known: whether every such file was trained so; if not, the user is told.
        hints: arguments that the tensors cannot show, from the file and its surroundings.
        finish: what else happens to the tensors, where a table of names is not enough.
        unfinish: the name before `finish` of one after it, for messages.
        required: patterns that must occur in the file, although a model without them could exist.
        kind: timm's class.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    plan: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Plan]
    never: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    mean: Rgb = IMAGENET_MEAN
    std: Rgb = IMAGENET_STD
    normalisation_known: bool = True
    hints: Hints = _no_hints
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _as_it_is
    unfinish: Callable[[str, Mapping[str, Tensor]], str] = _same_name
    required: tuple[str, ...] = ()
    kind: type[nn.Module] = VisionTransformer

    def recognises(self, names: Mapping[str, Tensor]) -> bool:
        """Whether a state dict is of this format."""
        return (
            all(any_matches(m, names) for m in self.marks)
            and not any(any_matches(n, names) for n in self.never)
            and (not self.any_of or any(any_matches(a, names) for a in self.any_of))
        )


_MASK = "the mask token of the pre-training"
_DECODER = "the decoder of the pre-training"
_HEAD = "the projection head of the pre-training"
_TEXT = "the text tower"
_RECOMPUTED = "computed by the model itself"


def _same(*patterns: str) -> tuple[Rule, ...]:
    """Rules for names that are timm's already."""
    return tuple(Rule(p, p) for p in patterns)


# --- plain ViT: DINO, iBOT, DeiT, MAE, DINOv2, and timm's own files --------------------

_DINOV3_MARKS = ("rope_embed.periods", "storage_tokens")
_PLAIN_VIT = (
    Rule("mask_token", None, _MASK),
    Rule("masked_embed", None, _MASK),
    Rule("decoder_*", None, _DECODER),
    Rule("head.mlp.*", None, _HEAD),
    Rule("head.last_layer*", None, _HEAD),
    Rule("head.prototypes*", None, _HEAD),
    Rule("dino_head.*", None, _HEAD),
    Rule("ibot_head.*", None, _HEAD),
    Rule("register_tokens", "reg_token"),
    Rule("blocks.#.mlp.w12.*", "blocks.#.mlp.fc1.*"),
    Rule("blocks.#.mlp.w3.*", "blocks.#.mlp.fc2.*"),
    *_same("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.proj.*"),
    *_same("blocks.#.norm1.*", "blocks.#.norm2.*", "blocks.#.ls1.gamma", "blocks.#.ls2.gamma"),
    *_same("blocks.#.attn.qkv.*", "blocks.#.attn.proj.*"),
    *_same("blocks.#.attn.q_norm.*", "blocks.#.attn.k_norm.*"),
    *_same("blocks.#.mlp.fc1.*", "blocks.#.mlp.fc2.*"),
    *_same("norm.*", "fc_norm.*", "norm_pre.*", "attn_pool.*"),
    *_same("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"),
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
        return {"architecture": architecture, "rgb": (CLIP_MEAN, CLIP_STD)}
    names = converted.tensors
    if any(name.startswith("norm_pre.") for name in names):
        return _clip_arguments(unwrapped.tensors, names, settings)
    if "cls_token" in names:
        trunk = unwrapped.path.endswith("visual.trunk.")  # of open_clip, CLIP's pixels by default
        return {"rgb": (CLIP_MEAN, CLIP_STD)} if trunk else {}
    raise ModelError(
        "1 missing (cls_token)",
        fix="if it has none (SigLIP, and others), its heads and its activation cannot be told from "
        "the tensors: name the architecture beside the file, as timm/vit_base_patch16_siglip_224",
    )


VIT = Format(
    name="vit",
    title="plain ViT, as DINO, iBOT, DeiT, MAE, DINOv2 and timm write it",
    marks=("blocks.#.attn.qkv.weight", "blocks.#.norm1.weight"),
    never=("blocks.#.attn.q_bias", "blocks.#.gamma_1", "rel_pos_bias.*", *_DINOV3_MARKS),
    rules=_PLAIN_VIT,
    plan=families.vision_transformer,
    normalisation_known=False,
    hints=_vit_hints,
    finish=fold_class_position,
)

# --- BEiT-style ViT --------------------

_BEIT = (
    Rule("mask_token", None, _MASK),
    Rule("lm_head.*", None, _HEAD),
    Rule("cls_pt_layers.*", None, _HEAD),
    Rule("lm_head_2.*", None, _HEAD),
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
    *_same("cls_token", "pos_embed", "patch_embed.proj.*"),
    *_same("rel_pos_bias.relative_position_bias_table"),
    *_same("blocks.#.attn.relative_position_bias_table"),
    *_same("blocks.#.norm1.*", "blocks.#.norm2.*", "blocks.#.gamma_1", "blocks.#.gamma_2"),
    *_same("blocks.#.attn.qkv.weight", "blocks.#.attn.q_bias", "blocks.#.attn.v_bias"),
    *_same("blocks.#.attn.proj.*", "blocks.#.mlp.fc1.*", "blocks.#.mlp.fc2.*"),
    *_same("norm.*", "fc_norm.*", "head.weight", "head.bias"),
)


def _beit_hints(unwrapped: Unwrapped, _: Converted, __: Settings) -> dict[str, Any]:
    """Feature distillation's own checkpoints are Beits too, but saw ImageNet's mean and std.

    Its pre-training has the student under `encoder.`; its training script saves `config` and
    `max_accuracy` beside the model, where BEiT's saves `args`.
    """
    if unwrapped.path.endswith("encoder.") or {"config", "max_accuracy"} & set(unwrapped.beside):
        return {"rgb": (IMAGENET_MEAN, IMAGENET_STD)}
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

# --- CLIP --------------------

_CLIP_TEXT = (
    "transformer.*",
    "token_embedding.*",
    "positional_embedding",
    "ln_final.*",
    "text_projection",
    "text.*",
    "logit_scale",
    "logit_bias",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
)


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
    *(Rule(pattern, None, _TEXT) for pattern in _CLIP_TEXT),
)


def _clip_arguments(
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
    return _clip_arguments(unwrapped.tensors, converted.tensors, settings)


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

# --- Swin --------------------

_BUFFERS = tuple(
    Rule(f"layers.#.blocks.#.{name}", f"layers.#.blocks.#.{name}", buffer=True)
    for name in ("attn_mask", "attn.relative_position_index", "attn.relative_coords_table")
)
_SWIN_BODY = (
    *_BUFFERS,
    Rule("mask_token", None, _MASK),
    Rule("head.mlp.*", None, _HEAD),
    Rule("head.last_layer*", None, _HEAD),
    Rule("head_dense.*", None, _HEAD),
    *_same("patch_embed.proj.*", "patch_embed.norm.*"),
    *_same("layers.#.blocks.#.norm1.*", "layers.#.blocks.#.norm2.*"),
    *_same("layers.#.blocks.#.mlp.fc1.*", "layers.#.blocks.#.mlp.fc2.*"),
    *_same("layers.#.blocks.#.attn.qkv.*", "layers.#.blocks.#.attn.proj.*"),
    *_same("norm.*"),
)
# Microsoft's Swin downsamples at the end of a stage, timm's at the beginning of the next
_MICROSOFT = (
    Rule("layers.#.downsample.*", "layers.#+1.downsample.*"),
    Rule("head.weight", "head.fc.weight"),
    Rule("head.bias", "head.fc.bias"),
)
_TIMM = _same("layers.#.downsample.*", "head.fc.weight", "head.fc.bias")
_SWIN_V1 = (*_SWIN_BODY, *_same("layers.#.blocks.#.attn.relative_position_bias_table"))
_SWIN_V2 = (
    *_SWIN_BODY,
    Rule("layers.#.blocks.#.attn.rpe_mlp.*", "layers.#.blocks.#.attn.cpb_mlp.*"),
    # one bias for all blocks of a stage, see `_untie_stages`
    Rule("layers.#.rel_pos_bias.rpe_mlp.*", "layers.#.rel_pos_bias.cpb_mlp.*"),
    *(
        Rule(f"layers.#.rel_pos_bias.{n}", f"layers.#.blocks.0.attn.{n}", buffer=True)
        for n in ("relative_position_index", "relative_coords_table")
    ),
    *_same("layers.#.blocks.#.enorm.*"),
    *_same("layers.#.blocks.#.attn.cpb_mlp.*", "layers.#.blocks.#.attn.logit_scale"),
    *_same("layers.#.blocks.#.attn.q_bias", "layers.#.blocks.#.attn.v_bias"),
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
    self_distilled = any(reason == _HEAD for reason in converted.left_out) or any(
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
        Rule("mask_token", None, _MASK),
        Rule("local_cls_norm.*", None, "the norm of the pre-training's local crops"),
        Rule("blocks.#.attn.qkv.bias_mask", None, "the mask of the key bias, which is zero here"),
        Rule("storage_tokens", "reg_token"),
        Rule("rope_embed.periods", "rope.periods"),
        Rule("blocks.#.ls1.gamma", "blocks.#.gamma_1"),
        Rule("blocks.#.ls2.gamma", "blocks.#.gamma_2"),
        Rule("blocks.#.mlp.w1.*", "blocks.#.mlp.fc1_g.*"),
        Rule("blocks.#.mlp.w2.*", "blocks.#.mlp.fc1_x.*"),
        Rule("blocks.#.mlp.w3.*", "blocks.#.mlp.fc2.*"),
        *_same("cls_token", "patch_embed.proj.*", "blocks.#.norm1.*", "blocks.#.norm2.*"),
        *_same("blocks.#.attn.qkv.*", "blocks.#.attn.proj.*"),
        *_same("blocks.#.mlp.fc1.*", "blocks.#.mlp.fc2.*", "norm.*"),
    ),
    plan=families.eva,
    hints=_dinov3_hints,
    finish=_dinov3_bias,
    unfinish=lambda name, _: re.sub(r"[qv]_bias$", "qkv.bias", name),
    kind=Eva,
)

FORMATS = (CLIP, DINOV3, SWIN, SWIN_TIMM, SWIN_V2, SWIN_V2_TIMM, BEIT, VIT)


def recognise(unwrapped: Unwrapped) -> Format | None:
    """The format of a state dict, by its names alone; None if it is none of ours."""
    return next((f for f in FORMATS if f.recognises(unwrapped.tensors)), None)
