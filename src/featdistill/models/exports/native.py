"""timm's families as transformers' own: class names, `config.json` and tensors, or a refusal.

Whatever these configurations do not say rightly the comparison with the loaded model finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone
from featdistill.models.checkpoints import transformers_tables as tables
from featdistill.models.checkpoints.tables import Rule
from featdistill.models.exports.common import cannot

_INSTEAD = "use --to timm, which transformers 5 loads through its TimmWrapperModel, or --to onnx"
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Native:
    """A model in transformers' own layout.

    Attributes:
        architecture: the class that holds it.
        config: its `config.json`.
        rules: the key table, which is followed backwards.
        tensors: under timm's names, with what transformers has besides.
        extra: tensors under transformers' names that have no name in timm.
        norm: the final norm, where `last_hidden_state` comes before it; a path in the model.
        pooled: where the pooled vector is in the output, if it means the same.
        notes: for the card.
    """

    architecture: str
    config: Mapping[str, Any]
    rules: tuple[Rule, ...]
    tensors: dict[str, Tensor]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    norm: str | None = None
    pooled: str | None = "pooler_output"
    notes: tuple[str, ...] = ()


def refuse(backbone: Backbone, why: str) -> ModelError:
    """The error for what transformers' own classes cannot hold."""
    return cannot(backbone, "transformers' own layout", why, _INSTEAD)


def native_of(backbone: Backbone) -> Native:
    """A backbone in transformers' own layout.

    Raises:
        ModelError: it has none.
    """
    model = backbone.model
    families: list[tuple[type[nn.Module], Callable[[Backbone, dict[str, Tensor]], Native]]] = [
        (Beit, _beit),
        (SwinTransformer, _swin),
        (SwinTransformerV2, _swin_v2),
        (VisionTransformerDistilled, _deit),
        (VisionTransformer, _plain),
    ]
    for kind, make in families:
        if type(model) is kind and backbone.build is not None:
            return make(backbone, dict(model.state_dict()))
    raise refuse(
        backbone, f"a {type(model).__name__} has no equal among the classes that are known here"
    )


def _plain(backbone: Backbone, tensors: dict[str, Tensor]) -> Native:
    if "norm_pre.weight" in tensors:
        return _clip(backbone, tensors)
    if "blocks.0.ls1.gamma" in tensors or "reg_token" in tensors:
        return _dinov2(backbone, tensors)
    return _vit(backbone, tensors)


# --- what the families share --------------------


def _sizes(backbone: Backbone) -> dict[str, Any]:
    """What every configuration says, from the modules themselves."""
    model = backbone.model
    side = model.patch_embed.patch_size
    if backbone.image_size[0] != backbone.image_size[1] or side[0] != side[1]:
        raise refuse(backbone, "its image or its patch is no square")
    names = dict(enumerate(backbone.class_names or _labels(backbone.num_classes)))
    return {
        "image_size": backbone.image_size[0],
        "patch_size": side[0],
        "num_channels": 3,
        "dtype": "float32",
        "torch_dtype": "float32",
        **(
            {
                "id2label": {str(i): name for i, name in names.items()},
                "label2id": {name: i for i, name in names.items()},
            }
            if names
            else {}
        ),
    }


def _labels(classes: int) -> Iterable[str]:
    return (f"LABEL_{i}" for i in range(classes))


def _layers(backbone: Backbone) -> dict[str, Any]:
    """What the configurations of the ViTs share."""
    block: Any = backbone.model.blocks[0]
    return {
        "hidden_size": backbone.model.embed_dim,
        "num_hidden_layers": len(backbone.model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc2.in_features,
        "hidden_act": _activation(backbone, block.mlp),
        "layer_norm_eps": block.norm1.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _activation(backbone: Backbone, mlp: Any) -> str:
    act = getattr(mlp, "act", None)
    name = type(act).__name__
    if name == "GELU" and getattr(act, "approximate", "none") == "tanh":
        return "gelu_pytorch_tanh"
    if name == "SiLU":  # of a gated MLP, whose family says it
        return "silu"
    if name not in _ACTIVATIONS:
        raise refuse(backbone, f"its activation is {name}")
    return _ACTIVATIONS[name]


def _move_norm(backbone: Backbone, tensors: dict[str, Tensor]) -> None:
    """A norm after the pooling of one token is a norm before it."""
    if "fc_norm.weight" not in tensors:
        return
    if backbone.model.global_pool != "token":
        raise refuse(
            backbone, "its norm follows the mean over the tokens, and the library's comes before"
        )
    for part in ("weight", "bias"):
        tensors[f"norm.{part}"] = tensors.pop(f"fc_norm.{part}")


def _whole_positions(model: Any, tensors: dict[str, Tensor]) -> None:
    """Positions of the map alone get a row of zeros for CLS."""
    positions = tensors.get("pos_embed")
    if positions is not None and getattr(model, "no_embed_class", False):
        tensors["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)


def _need_cls(backbone: Backbone) -> None:
    if backbone.prefix_names[:1] != ("cls",):
        raise refuse(backbone, "it has no CLS token")


# --- the families --------------------


def _beit(backbone: Backbone, tensors: dict[str, Tensor]) -> Native:
    model = backbone.model
    mean = model.global_pool == "avg"
    if not mean:
        _move_norm(backbone, tensors)
    elif "fc_norm.weight" not in tensors:
        raise refuse(backbone, "it takes the mean of normed tokens, and the library norms the mean")
    for layer in range(len(model.blocks)):
        for part in ("q_bias", "v_bias"):  # which the library always has
            zeros = torch.zeros(model.embed_dim)
            tensors.setdefault(f"blocks.{layer}.attn.{part}", zeros)
    head = backbone.num_classes > 0
    scale = "blocks.0.gamma_1" in tensors
    config = {
        "model_type": "beit",
        **_sizes(backbone),
        **_layers(backbone),
        "use_absolute_position_embeddings": "pos_embed" in tensors,
        "use_relative_position_bias": "blocks.0.attn.relative_position_bias_table" in tensors,
        "use_shared_relative_position_bias": model.rel_pos_bias is not None,
        "use_mean_pooling": mean,
        "use_mask_token": False,
        "layer_scale_init_value": 0.1 if scale else 0.0,
        "drop_path_rate": 0.0,
    }
    prefix = "beit." if head else ""
    return Native(
        "BeitForImageClassification" if head else "BeitModel",
        config,
        tables.beit_rules(prefix),
        tensors,
        norm=f"{prefix}pooler.layernorm" if mean else None,
        notes=(
            "At another image size transformers stretches the bias bilinearly, featdistill "
            "bicubically with antialiasing.",
        ),
    )


def _vit(backbone: Backbone, tensors: dict[str, Tensor]) -> Native:
    _need_cls(backbone)
    _move_norm(backbone, tensors)
    _whole_positions(backbone.model, tensors)
    head = backbone.num_classes > 0
    if head and backbone.model.global_pool != "token":
        raise refuse(backbone, "its classifier pools by the mean, the library's takes CLS")
    return Native(
        "ViTForImageClassification" if head else "ViTModel",
        _vit_config(backbone, "vit"),
        tables.vit_rules("vit." if head else ""),
        tensors,
        extra={} if head else _open_pooler(backbone),
        pooled=_cls_pooled(backbone),
        notes=_POOLER_NOTES if not head else (),
    )


def _deit(backbone: Backbone, tensors: dict[str, Tensor]) -> Native:
    head = backbone.num_classes > 0
    rules = tuple(
        rule for rule in tables.vit_rules("deit." if head else "") if rule.source != "classifier.*"
    )
    return Native(
        "DeiTForImageClassificationWithTeacher" if head else "DeiTModel",
        _vit_config(backbone, "deit"),
        rules,
        tensors,
        extra={} if head else _open_pooler(backbone),
        pooled=None,  # timm pools both tokens
        notes=_POOLER_NOTES if not head else (),
    )


_POOLER_NOTES = (
    "The library's pooler is left open (an identity): `pooler_output` is the normed CLS token. "
    "Versions that know no `pooler_act` apply tanh to it.",
)


def _vit_config(backbone: Backbone, model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        **_sizes(backbone),
        **_layers(backbone),
        "qkv_bias": backbone.model.blocks[0].attn.qkv.bias is not None,
        "pooler_act": "linear",
        "pooler_output_size": backbone.model.embed_dim,
    }


def _open_pooler(backbone: Backbone) -> dict[str, Tensor]:
    """The pooler that the library's ViT has and would otherwise fill with random numbers."""
    width = backbone.model.embed_dim
    return {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}


def _cls_pooled(backbone: Backbone) -> str | None:
    return "pooler_output" if backbone.model.global_pool == "token" else None


def _dinov2(backbone: Backbone, tensors: dict[str, Tensor]) -> Native:
    _need_cls(backbone)
    if backbone.num_classes:
        raise refuse(backbone, "the library's DINOv2 classifies CLS and the patches' mean together")
    _move_norm(backbone, tensors)
    model = backbone.model
    _whole_positions(model, tensors)
    width, layers = model.embed_dim, _layers(backbone)
    hidden = layers.pop("intermediate_size")
    gated = model.blocks[0].mlp.fc1.out_features == 2 * hidden
    ratio = next((r for r in range(1, 17) if _dinov2_hidden(width, r, gated) == hidden), None)
    if ratio is None:
        raise refuse(backbone, f"its MLP of {hidden} channels is no whole multiple of {width}")
    for layer in range(len(model.blocks)):
        for part in ("ls1", "ls2"):
            tensors.setdefault(f"blocks.{layer}.{part}.gamma", torch.ones(width))
    registers = "reg_token" in tensors
    config = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        **_sizes(backbone),
        **layers,
        "hidden_act": "gelu" if gated else layers["hidden_act"],
        "qkv_bias": model.blocks[0].attn.qkv.bias is not None,
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
        "use_mask_token": False,
        "drop_path_rate": 0.0,
        **({"num_register_tokens": tensors["reg_token"].shape[1]} if registers else {}),
    }
    # the class with registers has a mask token always
    extra = {"embeddings.mask_token": torch.zeros(1, width)} if registers else {}
    plain = ".mlp.fc" if gated else ".mlp.weights_"  # the MLP that this model has not
    rules = tuple(rule for rule in tables.dinov2_rules() if plain not in rule.sources[0])
    return Native(
        "Dinov2WithRegistersModel" if registers else "Dinov2Model",
        config,
        rules,
        tensors,
        extra=extra,
        pooled=_cls_pooled(backbone),
    )


def _dinov2_hidden(width: int, ratio: int, gated: bool) -> int:
    """Hidden channels of the library's DINOv2."""
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8 if gated else width * ratio


def _clip(backbone: Backbone, tensors: dict[str, Tensor]) -> Native:
    _need_cls(backbone)
    if backbone.num_classes or "fc_norm.weight" in tensors:
        raise refuse(backbone, "the library's CLIP classifies the mean of tokens before their norm")
    projection = backbone.projection
    tensors.pop("head.bias", None)  # zero: it is a projection
    layers = _layers(backbone)
    config = {
        "model_type": "clip_vision_model",
        **_sizes(backbone),
        **{key: value for key, value in layers.items() if "dropout" not in key},
        "attention_dropout": 0.0,
        "projection_dim": backbone.pooled_width,
    }
    return Native(
        "CLIPVisionModelWithProjection" if projection else "CLIPVisionModel",
        config,
        tables.clip_rules(),
        tensors,
        norm="post_layernorm",
        pooled="image_embeds" if projection else _cls_pooled(backbone),
        notes=("`last_hidden_state` comes before the final norm in the library's CLIP.",),
    )


def _swin(backbone: Backbone, tensors: dict[str, Tensor]) -> Native:
    config = {"model_type": "swin", **_stages(backbone)}
    if len({tuple(stage.blocks[0].window_size) for stage in backbone.model.layers}) > 1:
        raise refuse(backbone, "the grid of its last stage is smaller than the other windows")
    head = backbone.num_classes > 0
    return Native(
        "SwinForImageClassification" if head else "SwinModel",
        config,
        tables.swin_rules("swin." if head else ""),
        tensors,
    )


def _swin_v2(backbone: Backbone, tensors: dict[str, Tensor]) -> Native:
    before = [stage.blocks[0].attn.pretrained_window_size[0] for stage in backbone.model.layers]
    config = {
        "model_type": "swinv2",
        **_stages(backbone),
        "pretrained_window_sizes": before,
    }
    head = backbone.num_classes > 0
    return Native(
        "Swinv2ForImageClassification" if head else "Swinv2Model",
        config,
        tables.swin_v2_rules("swinv2." if head else ""),
        tensors,
    )


def _stages(backbone: Backbone) -> dict[str, Any]:
    model = backbone.model
    first: Any = model.layers[0].blocks[0]
    windows = {tuple(b.window_size) for stage in model.layers for b in stage.blocks}
    if any(h != w for h, w in windows):
        raise refuse(backbone, "its windows are no squares")
    if str(model.head.global_pool.pool_type) != "avg":
        raise refuse(backbone, f"it pools by {model.head.global_pool.pool_type}")
    return {
        **_sizes(backbone),
        "embed_dim": model.embed_dim,
        "hidden_size": model.num_features,
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_layers": len(model.layers),
        "num_heads": [stage.blocks[0].attn.num_heads for stage in model.layers],
        "window_size": max(h for h, _ in windows),
        "mlp_ratio": first.mlp.fc1.out_features / first.mlp.fc1.in_features,
        "qkv_bias": True,
        "hidden_act": _activation(backbone, first.mlp),
        "layer_norm_eps": first.norm1.eps,
        "use_absolute_embeddings": False,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
