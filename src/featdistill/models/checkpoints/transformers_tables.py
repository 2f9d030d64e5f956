"""Key tables of Hugging Face's transformers library, by its models; `transformers.py` uses them.

`prefix` is the model's own name inside a model with a head, as `vit.` in ViTForImageClassification.
The names are those in files: the library's own modules are called otherwise since its version 5,
which translates while it loads and saves.
"""

from __future__ import annotations

from torch import Tensor

from featdistill.models.checkpoints.tables import Rule

_MASK = "the mask token of the pre-training"
_DECODER = "the decoder of the pre-training"
_TEXT = "the text tower"
_POOLER = "transformers' pooler (a linear layer and tanh over CLS), which timm has not"
_COUNTED = "positions' numbers, which are only counted"


def _vit_layers(layer: str, attention: str) -> tuple[Rule, ...]:
    """A layer of transformers' ViT, as BEiT and Swin have it too."""
    return (
        Rule(f"{layer}.layernorm_before.*", "blocks.#.norm1.*"),
        Rule(f"{layer}.layernorm_after.*", "blocks.#.norm2.*"),
        Rule(f"{layer}.{attention}.output.dense.*", "blocks.#.attn.proj.*"),
        Rule(f"{layer}.intermediate.dense.*", "blocks.#.mlp.fc1.*"),
        Rule(f"{layer}.output.dense.*", "blocks.#.mlp.fc2.*"),
    )


_WORDS = ("query", "key", "value")
_LETTERS = ("q_proj", "k_proj", "v_proj")


def _joint(attention: str, names: tuple[str, str, str], rest: str, layer: str) -> Rule:
    """Query, key and value, which timm has in one tensor."""
    return Rule(tuple(f"{attention}.{name}.{rest}" for name in names), f"{layer}.attn.qkv.{rest}")


def _embeddings(prefix: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{prefix}embeddings.cls_token", "cls_token"),
        Rule(f"{prefix}embeddings.position_embeddings", "pos_embed"),
        Rule(f"{prefix}embeddings.patch_embeddings.projection.*", "patch_embed.proj.*"),
        Rule(f"{prefix}embeddings.mask_token", None, _MASK),
        Rule(f"{prefix}pooler.dense.*", None, _POOLER),
    )


def vit_rules(prefix: str = "") -> tuple[Rule, ...]:
    """`ViTModel`, `DeiTModel`, `ViTMAEModel`."""
    layer = f"{prefix}encoder.layer.#"
    return (
        *_embeddings(prefix),
        Rule(f"{prefix}embeddings.distillation_token", "dist_token"),
        *_vit_layers(layer, "attention"),
        _joint(f"{layer}.attention.attention", _WORDS, "*", "blocks.#"),
        Rule(f"{prefix}layernorm.*", "norm.*"),
        Rule("classifier.*", "head.*"),
        Rule("cls_classifier.*", "head.*"),
        Rule("distillation_classifier.*", "head_dist.*"),
        Rule("decoder.*", None, _DECODER),
    )


def dinov2_rules(prefix: str = "") -> tuple[Rule, ...]:
    """`Dinov2Model`, `Dinov2WithRegistersModel`."""
    layer = f"{prefix}encoder.layer.#"
    return (
        *_embeddings(prefix),
        Rule(f"{prefix}embeddings.register_tokens", "reg_token"),
        Rule(f"{layer}.norm1.*", "blocks.#.norm1.*"),
        Rule(f"{layer}.norm2.*", "blocks.#.norm2.*"),
        _joint(f"{layer}.attention.attention", _WORDS, "*", "blocks.#"),
        Rule(f"{layer}.attention.output.dense.*", "blocks.#.attn.proj.*"),
        Rule(f"{layer}.layer_scale1.lambda1", "blocks.#.ls1.gamma"),
        Rule(f"{layer}.layer_scale2.lambda1", "blocks.#.ls2.gamma"),
        Rule(f"{layer}.mlp.fc1.*", "blocks.#.mlp.fc1.*"),
        Rule(f"{layer}.mlp.fc2.*", "blocks.#.mlp.fc2.*"),
        Rule(f"{layer}.mlp.weights_in.*", "blocks.#.mlp.fc1.*"),
        Rule(f"{layer}.mlp.weights_out.*", "blocks.#.mlp.fc2.*"),
        Rule(f"{prefix}layernorm.*", "norm.*"),
        Rule("classifier.*", None, "the classifier, over CLS beside the patches' mean"),
    )


def beit_rules(prefix: str = "") -> tuple[Rule, ...]:
    """`BeitModel`: keys without bias, relative positions per layer or shared."""
    layer = f"{prefix}encoder.layer.#"
    attention = f"{layer}.attention.attention"
    own = f"{attention}.relative_position_bias.relative_position"
    shared = f"{prefix}encoder.relative_position_bias.relative_position"
    return (
        *_embeddings(prefix),
        *_vit_layers(layer, "attention"),
        _joint(attention, _WORDS, "weight", "blocks.#"),
        Rule(f"{attention}.query.bias", "blocks.#.attn.q_bias"),
        Rule(f"{attention}.value.bias", "blocks.#.attn.v_bias"),
        Rule(f"{layer}.lambda_1", "blocks.#.gamma_1"),
        Rule(f"{layer}.lambda_2", "blocks.#.gamma_2"),
        Rule(f"{own}_bias_table", "blocks.#.attn.relative_position_bias_table"),
        Rule(f"{own}_index", "blocks.#.attn.relative_position_index", buffer=True),
        Rule(f"{shared}_bias_table", "rel_pos_bias.relative_position_bias_table"),
        Rule(f"{shared}_index", "rel_pos_bias.relative_position_index", buffer=True),
        Rule(f"{prefix}layernorm.*", "norm.*"),
        Rule(f"{prefix}pooler.layernorm.*", "fc_norm.*"),
        Rule("classifier.*", "head.*"),
        Rule("lm_head.*", None, "the projection head of the pre-training"),
    )


def _class_token(value: Tensor) -> Tensor:
    return value[None, None]


def _one_more(value: Tensor) -> Tensor:
    return value[None]


def _flat(value: Tensor) -> Tensor:
    return value.flatten()


def _first(value: Tensor) -> Tensor:
    return value[0]


def _tower(prefix: str) -> tuple[Rule, ...]:
    """What CLIP's and SigLIP's image towers share."""
    layer = f"{prefix}encoder.layers.#"
    return (
        Rule(
            f"{prefix}embeddings.position_embedding.weight",
            "pos_embed",
            change=_one_more,
            back=_first,
        ),
        Rule(f"{prefix}embeddings.position_ids", None, _COUNTED),
        Rule(f"{prefix}embeddings.patch_embedding.*", "patch_embed.proj.*"),
        Rule(f"{layer}.layer_norm1.*", "blocks.#.norm1.*"),
        Rule(f"{layer}.layer_norm2.*", "blocks.#.norm2.*"),
        _joint(f"{layer}.self_attn", _LETTERS, "*", "blocks.#"),
        Rule(f"{layer}.self_attn.out_proj.*", "blocks.#.attn.proj.*"),
        Rule(f"{layer}.mlp.fc1.*", "blocks.#.mlp.fc1.*"),
        Rule(f"{layer}.mlp.fc2.*", "blocks.#.mlp.fc2.*"),
        Rule(f"{prefix}post_layernorm.*", "norm.*"),
        Rule("text_model.*", None, _TEXT),
        Rule("text_projection.*", None, _TEXT),
        Rule("logit_scale", None, _TEXT),
        Rule("logit_bias", None, _TEXT),
    )


def clip_rules(prefix: str = "vision_model.") -> tuple[Rule, ...]:
    """`CLIPVisionModel`, with or without its projection, and CLIPModel's image tower."""
    return (
        Rule(f"{prefix}embeddings.class_embedding", "cls_token", change=_class_token, back=_flat),
        Rule(f"{prefix}pre_layrnorm.*", "norm_pre.*"),  # the library's own spelling
        *_tower(prefix),
        Rule("visual_projection.weight", "head.weight"),
    )


def siglip_rules(prefix: str = "vision_model.") -> tuple[Rule, ...]:
    """`SiglipVisionModel` and SiglipModel's image tower, with attention pooling."""
    head = f"{prefix}head"
    return (
        *_tower(prefix),
        Rule(f"{head}.probe", "attn_pool.latent"),
        Rule(f"{head}.attention.in_proj_weight", "attn_pool.qkv.weight"),  # see `_query_apart`
        Rule(f"{head}.attention.in_proj_bias", "attn_pool.qkv.bias"),
        Rule(f"{head}.attention.out_proj.*", "attn_pool.proj.*"),
        Rule(f"{head}.layernorm.*", "attn_pool.norm.*"),
        Rule(f"{head}.mlp.*", "attn_pool.mlp.*"),
    )


def _swin_stages(prefix: str) -> tuple[Rule, ...]:
    block, target = f"{prefix}encoder.layers.#.blocks.#", "layers.#.blocks.#"
    own = f"{block}.attention.self"
    layers = _vit_layers(block, "attention")
    return (
        Rule(f"{prefix}embeddings.patch_embeddings.projection.*", "patch_embed.proj.*"),
        Rule(f"{prefix}embeddings.norm.*", "patch_embed.norm.*"),
        Rule(f"{prefix}embeddings.mask_token", None, _MASK),
        *(Rule(r.source, f"layers.#.{r.target}") for r in layers),
        Rule(
            f"{own}.relative_position_index", f"{target}.attn.relative_position_index", buffer=True
        ),
        # timm downsamples at the beginning of the next stage
        Rule(f"{prefix}encoder.layers.#.downsample.*", "layers.#+1.downsample.*"),
        Rule(f"{prefix}layernorm.*", "norm.*"),
        Rule("classifier.*", "head.fc.*"),
        Rule("decoder.*", None, _DECODER),
    )


def swin_rules(prefix: str = "") -> tuple[Rule, ...]:
    """`SwinModel`."""
    block, target = f"{prefix}encoder.layers.#.blocks.#", "layers.#.blocks.#"
    table = "relative_position_bias_table"
    return (
        *_swin_stages(prefix),
        _joint(f"{block}.attention.self", _WORDS, "*", target),
        Rule(f"{block}.attention.self.{table}", f"{target}.attn.{table}"),
    )


def swin_v2_rules(prefix: str = "") -> tuple[Rule, ...]:
    """`Swinv2Model`: keys without bias, continuous positions."""
    own, target = f"{prefix}encoder.layers.#.blocks.#.attention.self", "layers.#.blocks.#.attn"
    table = "relative_coords_table"
    return (
        *_swin_stages(prefix),
        _joint(own, _WORDS, "weight", "layers.#.blocks.#"),
        Rule(f"{own}.query.bias", f"{target}.q_bias"),
        Rule(f"{own}.value.bias", f"{target}.v_bias"),
        Rule(f"{own}.continuous_position_bias_mlp.*", f"{target}.cpb_mlp.*"),
        Rule(f"{own}.logit_scale", f"{target}.logit_scale"),
        Rule(f"{own}.{table}", f"{target}.{table}", buffer=True),
    )


def dinov3_rules(prefix: str = "") -> tuple[Rule, ...]:
    """`DINOv3ViTModel`: keys without bias, rotary positions that no tensor shows."""
    layer, attention = f"{prefix}layer.#", f"{prefix}layer.#.attention"
    return (
        Rule("embeddings.cls_token", "cls_token"),
        Rule("embeddings.register_tokens", "reg_token"),
        Rule("embeddings.mask_token", None, _MASK),
        Rule("embeddings.patch_embeddings.*", "patch_embed.proj.*"),
        Rule(f"{layer}.norm1.*", "blocks.#.norm1.*"),
        Rule(f"{layer}.norm2.*", "blocks.#.norm2.*"),
        _joint(attention, _LETTERS, "weight", "blocks.#"),
        Rule(f"{attention}.q_proj.bias", "blocks.#.attn.q_bias"),
        Rule(f"{attention}.v_proj.bias", "blocks.#.attn.v_bias"),
        Rule(f"{attention}.o_proj.*", "blocks.#.attn.proj.*"),
        Rule(f"{layer}.layer_scale1.lambda1", "blocks.#.gamma_1"),
        Rule(f"{layer}.layer_scale2.lambda1", "blocks.#.gamma_2"),
        Rule(f"{layer}.mlp.gate_proj.*", "blocks.#.mlp.fc1_g.*"),
        Rule(f"{layer}.mlp.up_proj.*", "blocks.#.mlp.fc1.*"),
        Rule(f"{layer}.mlp.down_proj.*", "blocks.#.mlp.fc2.*"),
        Rule("norm.*", "norm.*"),
    )
