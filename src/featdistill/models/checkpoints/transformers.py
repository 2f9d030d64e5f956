"""Files of Hugging Face's transformers library: a format for each `model_type`.

What the tensors do not show stands in the `config.json` beside them, without which such a file is
not read. The key tables (`transformers_tables.py`) are used in both directions:
`exports/to_huggingface.py` writes by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

from featdistill.core.errors import ModelError, did_you_mean
from featdistill.models.checkpoints import families
from featdistill.models.checkpoints.clip import unbiased_head
from featdistill.models.checkpoints.sizes import patch_of
from featdistill.models.checkpoints.spec import CLIP_MEAN, CLIP_STD, HALF, Format, Settings
from featdistill.models.checkpoints.tables import Converted, Rule, any_matches
from featdistill.models.checkpoints.transformers_config import (
    Config,
    activation_of,
    check_against,
    norm_eps_of,
    number,
    only_gelu,
    positive,
    side_of,
    tower_config,
    whole_each,
)
from featdistill.models.checkpoints.transformers_tables import (
    beit_rules,
    clip_rules,
    dinov2_rules,
    dinov3_rules,
    siglip_rules,
    swin_rules,
    swin_v2_rules,
    vit_rules,
)
from featdistill.models.checkpoints.unwrap import Unwrapped
from featdistill.models.checkpoints.vits import fold_class_position
from featdistill.models.positions import SHARED_TABLE


def _vit_hints(_: Unwrapped, converted: Converted, settings: Settings) -> dict[str, Any]:
    config = tower_config(settings)
    check_against(config, converted)
    eps = 1e-6 if str(config.get("model_type")).startswith("dinov2") else 1e-12
    act = activation_of(config, "gelu")
    return {
        "num_heads": positive(config, "num_attention_heads", 12),
        **({} if act == "gelu" else {"act_layer": act}),
        **norm_eps_of(config, eps, 1e-6),
    }


def _tower_hints(_: Unwrapped, converted: Converted, settings: Settings) -> dict[str, Any]:
    config = tower_config(settings)
    check_against(config, converted)
    clip = str(settings["transformers"].get("model_type")).startswith("clip")
    if clip and "norm_pre.weight" not in converted.tensors:
        raise ModelError("1 missing (norm_pre.weight)")
    act = activation_of(config, "quick_gelu" if clip else "gelu_pytorch_tanh")
    own = {"gelu": "clip_224", "quick_gelu": "clip_quickgelu_224"}.get(act, "clip_224")
    eps = 1e-5 if clip else 1e-6
    return {
        "architecture": f"vit_base_patch16_{own if clip else 'siglip_224'}",
        "num_heads": positive(config, "num_attention_heads", 12),
        **({} if clip and act in ("gelu", "quick_gelu") else {"act_layer": act}),
        **norm_eps_of(config, eps, eps),
    }


def _beit_hints(_: Unwrapped, converted: Converted, settings: Settings) -> dict[str, Any]:
    config = tower_config(settings)
    check_against(config, converted)
    only_gelu(config, "Beit")
    if config.get("use_shared_relative_position_bias") and SHARED_TABLE not in converted.tensors:
        raise ModelError(f"1 missing ({SHARED_TABLE})")
    return {
        "num_heads": positive(config, "num_attention_heads", 12),
        "img_size": side_of("image_size", config.get("image_size", 224)),
        **norm_eps_of(config, 1e-12, 1e-6),
    }


_SWIN_HEADS = (3, 6, 12, 24)
_SWIN_DEPTHS = (2, 2, 6, 2)


def _swin_heads(config: Config) -> tuple[int, ...]:
    """Heads of each stage."""
    heads = whole_each(config, "num_heads", _SWIN_HEADS)
    stages = len(whole_each(config, "depths", _SWIN_DEPTHS))
    if len(heads) != stages:
        raise ModelError(f"num_heads {list(heads)} in its config.json for {stages} depths")
    return heads


def _swin_hints(_: Unwrapped, __: Converted, settings: Settings) -> dict[str, Any]:
    config = tower_config(settings)
    only_gelu(config, "Swin")
    return {
        "img_size": side_of("image_size", config.get("image_size", 224)),
        "num_heads": _swin_heads(config),
        **norm_eps_of(config, 1e-5, 1e-5),
    }


def _swin_v2_hints(_: Unwrapped, converted: Converted, settings: Settings) -> dict[str, Any]:
    config = tower_config(settings)
    only_gelu(config, "Swin V2")
    size, window = (
        side_of("image_size", config.get("image_size", 224)),
        side_of("window_size", config.get("window_size", 7)),
    )
    grid = size // patch_of(converted.tensors)
    stages = len(whole_each(config, "depths", _SWIN_DEPTHS))
    before = config.get("pretrained_window_sizes", ())
    if not isinstance(before, list | tuple) or not all(isinstance(n, int) for n in before):
        raise ModelError(f"pretrained_window_sizes {before!r} in its config.json")
    before = tuple(before)
    return {
        "img_size": size,
        "num_heads": _swin_heads(config),
        "windows": [min(window, grid // 2**stage) for stage in range(stages)],
        **({"pretrained_window_sizes": before} if any(before) else {}),
        **norm_eps_of(config, 1e-5, 1e-5),
    }


def _dinov3_hints(_: Unwrapped, converted: Converted, settings: Settings) -> dict[str, Any]:
    config = tower_config(settings)
    check_against(config, converted)
    gated = any_matches("blocks.#.mlp.fc1_g.weight", converted.tensors)
    if activation_of(config, "gelu") != ("silu" if gated else "gelu"):
        raise ModelError(
            f"hidden_act '{config['hidden_act']}' in its config.json: timm's DINOv3 has GELU, or "
            "SiLU where the MLP is gated"
        )
    width = positive(config, "hidden_size", 384)
    heads = positive(config, "num_attention_heads", 6)
    if width % (4 * heads):
        raise ModelError(
            f"num_attention_heads {heads} in its config.json for a hidden_size of {width}"
        )
    channels = width // heads
    # computed as the library does, in float32
    steps = torch.arange(0, 1, 4 / channels, dtype=torch.float32)
    periods = float(number(config, "rope_theta", 100.0)) ** steps
    return {
        "rope_periods": tuple(periods.tolist()),
        "img_size": side_of("image_size", config.get("image_size", 224)),
        **norm_eps_of(config, 1e-5, 1e-5),
    }


def _name_gate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other half of a gated MLP has a name of its own in timm."""
    if not any_matches("blocks.#.mlp.fc1_g.weight", tensors):
        return tensors
    return {name.replace(".mlp.fc1.", ".mlp.fc1_x."): v for name, v in tensors.items()}


def _query_apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's pooling: timm keeps the query's projection apart from the keys' and values'."""
    out = {}
    for name, value in tensors.items():
        if name.startswith("attn_pool.qkv.") and value.ndim and len(value) % 3 == 0:
            end = name.rpartition(".")[2]
            query, *rest = value.chunk(3)
            out[f"attn_pool.q.{end}"], out[f"attn_pool.kv.{end}"] = query, torch.cat(rest)
        else:
            out[name] = value
    return out


def _joint_name(name: str, _: Mapping[str, Tensor]) -> str:
    return name.replace("attn_pool.q.", "attn_pool.qkv.").replace("attn_pool.kv.", "attn_pool.qkv.")


# --- the formats, by `model_type` --------------------


def _both(rules: Callable[[str], tuple[Rule, ...]], *prefixes: str) -> tuple[Rule, ...]:
    """A table for a model alone and inside a model with a head; equal lines once."""
    return tuple(dict.fromkeys(rule for prefix in prefixes for rule in rules(prefix)))


def _marks(prefixes: tuple[str, ...], mark: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{mark}" for prefix in prefixes)


_LAYER = "encoder.layer.#.attention.attention.query.weight"
_TOWER = "encoder.layers.#.self_attn.q_proj.weight"
_WINDOW = "encoder.layers.#.blocks.#.attention.self.query.weight"
_VIT_PREFIXES, _DINO_PREFIXES = ("", "vit.", "deit."), ("", "dinov2.", "dinov2_with_registers.")

_VIT = Format(
    name="transformers-vit",
    title="transformers' ViT",
    marks=(),
    any_of=_marks(_VIT_PREFIXES, _LAYER),
    rules=_both(vit_rules, *_VIT_PREFIXES),
    plan=families.vision_transformer,
    mean=HALF,
    std=HALF,
    normalisation_known=False,
    hints=_vit_hints,
)
_DEIT = Format(
    name="transformers-deit",
    title="transformers' DeiT or MAE encoder",
    marks=(),
    any_of=_marks(_VIT_PREFIXES, _LAYER),
    rules=_both(vit_rules, *_VIT_PREFIXES),
    plan=families.vision_transformer,
    normalisation_known=False,
    hints=_vit_hints,
)
_DINOV2 = Format(
    name="transformers-dinov2",
    title="transformers' DINOv2",
    marks=(),
    any_of=_marks(_DINO_PREFIXES, _LAYER),
    rules=_both(dinov2_rules, *_DINO_PREFIXES),
    plan=families.vision_transformer,
    normalisation_known=False,
    hints=_vit_hints,
    finish=fold_class_position,
)
_BEIT = Format(
    name="transformers-beit",
    title="transformers' BEiT",
    marks=(),
    any_of=_marks(("", "beit."), _LAYER),
    rules=_both(beit_rules, "", "beit."),
    plan=families.beit,
    mean=HALF,
    std=HALF,
    normalisation_known=False,
    hints=_beit_hints,
    kind=Beit,
)
_CLIP = Format(
    name="transformers-clip",
    title="transformers' CLIP",
    marks=(),
    any_of=_marks(("", "vision_model."), _TOWER),
    rules=_both(clip_rules, "vision_model.", ""),
    plan=families.vision_transformer,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    hints=_tower_hints,
    finish=unbiased_head,
)
_SIGLIP = Format(
    name="transformers-siglip",
    title="transformers' SigLIP",
    marks=(),
    any_of=_marks(("", "vision_model."), _TOWER),
    rules=_both(siglip_rules, "vision_model.", ""),
    plan=families.vision_transformer,
    mean=HALF,
    std=HALF,
    hints=_tower_hints,
    finish=_query_apart,
    unfinish=_joint_name,
)
_SWIN = Format(
    name="transformers-swin",
    title="transformers' Swin",
    marks=(),
    any_of=_marks(("", "swin."), _WINDOW),
    rules=_both(swin_rules, "", "swin."),
    plan=families.swin,
    normalisation_known=False,
    hints=_swin_hints,
    kind=SwinTransformer,
    pads_first=True,
)
_SWIN_V2 = Format(
    name="transformers-swinv2",
    title="transformers' Swin V2",
    marks=(),
    any_of=_marks(("", "swinv2."), _WINDOW),
    rules=_both(swin_v2_rules, "", "swinv2."),
    plan=families.swin_v2,
    normalisation_known=False,
    hints=_swin_v2_hints,
    kind=SwinTransformerV2,
    pads_first=True,
)

_DINOV3 = Format(
    name="transformers-dinov3",
    title="transformers' DINOv3",
    marks=(),
    any_of=_marks(("", "model."), "layer.#.attention.q_proj.weight"),
    rules=_both(dinov3_rules, "", "model."),
    plan=families.eva,
    normalisation_known=False,
    hints=_dinov3_hints,
    finish=_name_gate,
    unfinish=lambda name, _: name.replace(".mlp.fc1_x.", ".mlp.fc1."),
    kind=Eva,
)

FORMATS: dict[str, Format] = {
    "vit": _VIT,
    "vit_mae": _DEIT,
    "deit": _DEIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": _DINOV3,
    "beit": _BEIT,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "swin": _SWIN,
    "swinv2": _SWIN_V2,
}


def format_beside(config: Config) -> Format:
    """The format that a `config.json` names.

    Raises:
        ModelError: its `model_type` is not known here.
    """
    kind = str(config["model_type"])
    if kind not in FORMATS:
        raise ModelError(
            f"its config.json says model_type '{kind}', which is not known here",
            expected=", ".join(FORMATS),
            fix=did_you_mean(kind, FORMATS) or "timm may have the model: timm/NAME",
        )
    return FORMATS[kind]


def looks_like(names: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is one of transformers', whatever its model."""
    return any(f.recognises(names) for f in FORMATS.values())


def class_names_of(config: Config, classes: int) -> tuple[str, ...] | None:
    """The classes' names in a `config.json`, if it names exactly so many."""
    names = config.get("id2label")
    if not classes or not isinstance(names, dict) or len(names) != classes:
        return None
    try:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except ValueError:
        return None
