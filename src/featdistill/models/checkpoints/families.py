"""From tensors under timm's names to the timm model that they belong to.

Every function takes such tensors and gives the architecture with all the arguments that the tensors
show. What tensors cannot show (activations, epsilons) the checkpoint's format says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from featdistill.core.errors import ModelError
from featdistill.models.backbone import TimmBuild
from featdistill.models.checkpoints.sizes import (
    Tensors,
    classes_of,
    count_of,
    grid_side,
    heads_of,
    hidden_of,
    need,
    patch_of,
    vote,
    width_of,
    window_side,
)

_BLOCK = r"blocks\.(\d+)\."
_BLOCK_NORMS = r"blocks\.\d+\.norm[12]\.(weight|bias)"
_BLOCK_MLP = r"blocks\.\d+\.mlp\.(fc[12]\.(?:weight|bias))"


@dataclass(frozen=True)
class Plan:
    """The model that a checkpoint belongs to.

    Attributes:
        build: the timm architecture with every argument.
        image_size: side in pixels that its positions are made for.
        assumed: what the tensors do not show and was taken for granted, one clause each.
    """

    build: TimmBuild
    image_size: int
    assumed: tuple[str, ...] = ()


def _has(tensors: Tensors, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _block_has(tensors: Tensors, rest: str) -> bool:
    expression = re.compile(_BLOCK + rest)
    return any(expression.fullmatch(name) for name in tensors)


def vision_transformer(tensors: Tensors, extra: Mapping[str, Any]) -> Plan:
    """timm's `VisionTransformer` (or its distilled DeiT).

    Args:
        extra: `architecture` to start from, and arguments that the tensors cannot show.
    """
    extra = dict(extra)
    width = width_of(tensors, _BLOCK_NORMS)
    patch = patch_of(tensors)
    prefix = [n for n in ("cls_token", "dist_token") if n in tensors]
    side, bare = _positions(tensors, prefix)
    distilled = "dist_token" in tensors
    classes = classes_of(tensors, "head")
    if distilled and classes_of(tensors, "head_dist") != classes:
        raise ModelError("head and head_dist have other numbers of classes")
    hidden = hidden_of(tensors, _BLOCK_MLP)
    arguments: dict[str, Any] = {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": count_of(tensors, _BLOCK, "transformer blocks"),
        "num_heads": heads_of(width),
        "mlp_ratio": hidden / width,
        "qkv_bias": _block_has(tensors, r"attn\.qkv\.bias"),
        "num_classes": classes,
        "global_pool": "avg" if _has(tensors, "fc_norm.") or not prefix else "token",
    }
    if _block_has(tensors, r"ls1\.gamma"):
        arguments["init_values"] = 1e-5
    if _block_has(tensors, r"attn\.q_norm\.weight"):
        arguments["qk_norm"] = True
    if not distilled:
        arguments |= _vit_tokens(tensors, bare=bare)
    if _gated(tensors):
        # timm counts the gate among the hidden channels
        extra.setdefault("architecture", "vit_giant_patch14_dinov2")
        arguments["mlp_ratio"] = _first_rows(tensors) / width
    default = "deit_base_distilled_patch16_224" if distilled else "vit_base_patch16_224"
    architecture = extra.pop("architecture", default)
    return Plan(TimmBuild(architecture, {**arguments, **extra}), side * patch)


# Registers of published models; their number shows in no other tensor.
_REGISTERS = (1, 2, 4, 5, 8, 16)


def _registers(tensors: Tensors, *, required: bool = False) -> int:
    if "reg_token" not in tensors and not required:
        return 0
    registers = need(tensors, "reg_token", 3)
    if registers.shape[1] not in _REGISTERS:
        raise ModelError(
            f"1 of another shape (reg_token {tuple(registers.shape)})",
            expected=f"{', '.join(map(str, _REGISTERS[:-1]))} or {_REGISTERS[-1]} registers",
        )
    return int(registers.shape[1])


def _positions(tensors: Tensors, prefix: list[str]) -> tuple[int, bool]:
    """Side of the grid, and whether tokens before the map are without positions.

    Such a bare embedding is DeiT-III's (known by its layer scale and its classifier: DINOv2 has
    none) and that of models with registers; anywhere else it is one that lost its first row.
    """
    rows = need(tensors, "pos_embed", 3).shape[1]
    registers = _registers(tensors)
    third_deit = _block_has(tensors, r"ls1\.gamma") and "head.weight" in tensors
    may_be_bare = registers > 0 or third_deit
    if (prefix or registers) and may_be_bare and isqrt(rows) ** 2 == rows:
        return isqrt(rows), True
    everyone = [*prefix, *["reg_token"] * registers]
    if registers and isqrt(max(0, rows - len(everyone))) ** 2 == rows - len(everyone):
        return grid_side(rows, everyone, "pos_embed"), False
    return grid_side(rows, prefix, "pos_embed"), False


def eva(tensors: Tensors, extra: Mapping[str, Any]) -> Plan:
    """timm's `Eva` as DINOv3 has it: rotary positions, registers, layer scale.

    Args:
        extra: `rope_periods`, which also tell the heads: 4 channels for each period.
    """
    width = width_of(tensors, _BLOCK_NORMS)
    patch = patch_of(tensors)
    gated = _block_has(tensors, r"mlp\.fc1_[gx]\.(weight|bias)")
    hidden = hidden_of(tensors, r"blocks\.\d+\.mlp\.(fc1(?:_[gx])?\.(?:weight|bias)|fc2\.weight)")
    arguments: dict[str, Any] = {
        "img_size": 16 * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": count_of(tensors, _BLOCK, "transformer blocks"),
        "num_heads": width // (4 * len(extra["rope_periods"])),
        "mlp_ratio": hidden / width,
        "swiglu_mlp": gated,
        "swiglu_align_to": 8 if gated else 0,
        "qkv_bias": _block_has(tensors, r"attn\.[qv]_bias"),
        "num_reg_tokens": _registers(tensors, required=True),
        "num_classes": 0,
        "global_pool": "token",
        **extra,
    }
    image = arguments["img_size"]
    build = TimmBuild("vit_small_patch16_dinov3_qkvb", arguments)
    return Plan(build, image, () if "img_size" in extra else (f"an image of {image} pixels",))


def _vit_tokens(tensors: Tensors, *, bare: bool) -> dict[str, Any]:
    """Arguments for tokens, their positions, and the end of a plain ViT."""
    arguments: dict[str, Any] = {"class_token": "cls_token" in tensors}
    if registers := _registers(tensors):
        arguments["reg_tokens"] = registers
    if bare:
        arguments["no_embed_class"] = True
    if _has(tensors, "attn_pool."):
        arguments["global_pool"] = "map"
    if _has(tensors, "norm.") or _has(tensors, "fc_norm."):
        arguments["fc_norm"] = _has(tensors, "fc_norm.")
    return arguments


def _gated(tensors: Tensors) -> bool:
    """Whether the MLPs are SwiGLU: fc1 gives twice the channels that fc2 takes."""
    rows, columns = _first_rows(tensors), _last_columns(tensors)
    return rows == 2 * columns


def _first_rows(tensors: Tensors) -> int:
    expression = re.compile(r"blocks\.\d+\.mlp\.fc1\.(weight|bias)")
    return vote(
        (v.shape[0] for n, v in tensors.items() if expression.fullmatch(n) and v.ndim), "MLP"
    )


def _last_columns(tensors: Tensors) -> int:
    """Channels that the blocks' second linear layers take."""
    expression = re.compile(r"blocks\.\d+\.mlp\.fc2\.weight")
    return vote(
        (v.shape[1] for n, v in tensors.items() if expression.fullmatch(n) and v.ndim == 2), "MLP"
    )


def beit(tensors: Tensors, extra: Mapping[str, Any]) -> Plan:
    """timm's `Beit`: BEiT, BEiT v2, and the students of feature distillation.

    Args:
        extra: arguments that are known from elsewhere: `num_heads`, `img_size`.
    """
    width = width_of(tensors, _BLOCK_NORMS)
    patch = patch_of(tensors)
    shared = "rel_pos_bias.relative_position_bias_table"
    own = re.compile(_BLOCK + r"attn\.relative_position_bias_table")
    tables = {n: v for n, v in tensors.items() if n == shared or own.fullmatch(n)}
    sides = []
    if "pos_embed" in tensors:
        rows = need(tensors, "pos_embed", 3).shape[1]
        sides.append(grid_side(rows, ("cls_token",), "pos_embed"))
    if tables:
        if not any(v.ndim == 2 for v in tables.values()):
            need(tensors, next(iter(tables)), 2)
        usual = vote((v.shape[0] for v in tables.values() if v.ndim), "window")
        name = next(n for n, v in tables.items() if v.ndim and v.shape[0] == usual)
        sides.append(window_side(usual, 3, name))
    if not sides and "img_size" in extra:
        sides = [extra["img_size"] // patch]
    if not sides:
        raise ModelError(
            f"the checkpoint has no positions: neither pos_embed nor {shared} nor "
            "blocks.#.attn.relative_position_bias_table"
        )
    heads = extra.get("num_heads") or _beit_heads(width, tables)
    if tables and not any(v.ndim == 2 and v.shape[1] == heads for v in tables.values()):
        name, value = next(iter(tables.items()))
        raise ModelError(f"1 of another shape ({name} {tuple(value.shape)} for {heads} heads)")
    arguments: dict[str, Any] = {
        "img_size": sides[0] * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": count_of(tensors, _BLOCK, "transformer blocks"),
        "num_heads": heads,
        "mlp_ratio": hidden_of(tensors, _BLOCK_MLP) / width,
        "qkv_bias": _block_has(tensors, r"attn\.[qv]_bias"),
        "init_values": 0.1 if _block_has(tensors, r"gamma_[12]") else 0.0,  # timm drops None
        "use_abs_pos_emb": "pos_embed" in tensors,
        "use_rel_pos_bias": any(n != shared for n in tables),
        "use_shared_rel_pos_bias": shared in tables,
        "num_classes": classes_of(tensors, "head"),
        "global_pool": "avg" if _has(tensors, "fc_norm.") else "token",
    }
    return Plan(TimmBuild("beit_base_patch16_224", {**arguments, **extra}), sides[0] * patch)


def _beit_heads(width: int, tables: Tensors) -> int:
    """Heads by the family's rule, or as many as several bias tables agree on.

    A table alone proves nothing: it may have lost columns.
    """
    usual = heads_of(width)
    columns = {v.shape[1] if v.ndim == 2 else 0 for v in tables.values()}
    if len(tables) < 2 or len(columns) != 1 or usual in columns:
        return usual
    heads = columns.pop()
    return heads if heads and width % heads == 0 else usual


_STAGE = r"layers\.(\d+)\."
_STAGE_MLP = r"layers\.0\.blocks\.\d+\.mlp\.(fc[12]\.(?:weight|bias))"


def _swin_depths(tensors: Tensors, stage: str = "layers") -> tuple[int, ...]:
    number = re.compile(rf"{stage}\.(\d+)\.blocks\.")
    stages = max((int(m[1]) for n in tensors if (m := number.match(n))), default=-1) + 1
    if not stages:
        raise ModelError("the checkpoint has no stages of blocks")
    return tuple(
        count_of(tensors, rf"{stage}\.{i}\.blocks\.(\d+)\.", f"blocks in stage {i}")
        for i in range(stages)
    )


def _swin_sizes(tensors: Tensors, depths: tuple[int, ...]) -> tuple[int, dict[str, Any]]:
    """Width of the first stage, and the arguments that both Swins share."""
    last = len(depths) - 1
    width = width_of(tensors, rf"layers\.{last}\.blocks\.\d+\.norm[12]\.(weight|bias)") // 2**last
    return width, {
        "patch_size": patch_of(tensors),
        "embed_dim": width,
        "depths": depths,
        "mlp_ratio": hidden_of(tensors, _STAGE_MLP) / width,
        "qkv_bias": any(re.search(r"attn\.(qkv\.bias|[qv]_bias)", n) for n in tensors),
        "num_classes": classes_of(tensors, "head.fc"),
        "global_pool": "avg",
    }


def _swin_image(window: int, last_window: int, patch: int, stages: int) -> int:
    """The image that the windows are made for: the last stage's grid is one window, or the usual.

    A last window smaller than the others is the whole last grid. Otherwise the published models'
    rule holds: the window divides the last grid, and the image is the nearest to 224.
    """
    reduction = patch * 2 ** (stages - 1)
    if last_window < window:
        return last_window * reduction
    times = max(1, round(224 / (window * reduction)))
    return times * window * reduction


def swin(tensors: Tensors, extra: Mapping[str, Any]) -> Plan:
    """timm's `SwinTransformer`."""
    depths = _swin_depths(tensors)
    _, arguments = _swin_sizes(tensors, depths)
    windows, heads = [], []
    for stage in range(len(depths)):
        end = re.compile(rf"layers\.{stage}\.blocks\.\d+\.attn\.relative_position_bias_table")
        tables = {n: v for n, v in tensors.items() if end.fullmatch(n)}
        if not any(v.ndim == 2 for v in tables.values()):
            need(tensors, f"layers.{stage}.blocks.0.attn.relative_position_bias_table", 2)
        rows = vote((v.shape[0] for v in tables.values() if v.ndim == 2), "windows")
        windows.append(window_side(rows, 0, next(iter(tables))))
        heads.append(vote((v.shape[1] for v in tables.values() if v.ndim == 2), "heads"))
    image = _swin_image(windows[0], windows[-1], arguments["patch_size"], len(depths))
    return _swin_plan("swin_tiny_patch4_window7_224", arguments, heads, windows[0], image, extra)


def _swin_plan(
    architecture: str,
    arguments: Mapping[str, Any],
    heads: list[int],
    window: int,
    image: int,
    extra: Mapping[str, Any],
) -> Plan:
    every = {
        **arguments,
        "num_heads": _regular(heads),
        "window_size": window,
        "img_size": image,
        **extra,
    }
    assumed = () if "img_size" in extra else (f"an image of {image} pixels",)
    return Plan(TimmBuild(architecture, every), every["img_size"], assumed)


def _regular(heads: list[int]) -> tuple[int, ...]:
    """Heads that double from stage to stage, as most of them say."""
    first = vote((h // 2**stage for stage, h in enumerate(heads)), "heads")
    return tuple(first * 2**stage for stage in range(len(heads)))


def swin_v2(tensors: Tensors, extra: Mapping[str, Any]) -> Plan:
    """timm's `SwinTransformerV2`; its window is not among timm's tensors, but among Microsoft's.

    Args:
        extra: `windows`, one a stage, where the checkpoint has the buffers that show them.
    """
    extra = dict(extra)
    depths = _swin_depths(tensors)
    _, arguments = _swin_sizes(tensors, depths)
    heads = []
    for stage in range(len(depths)):
        end = re.compile(rf"layers\.{stage}\.blocks\.\d+\.attn\.logit_scale")
        scales = [v.shape[0] for n, v in tensors.items() if end.fullmatch(n) and v.ndim]
        if not scales:
            need(tensors, f"layers.{stage}.blocks.0.attn.logit_scale", 3)
        heads.append(vote(scales, "heads"))
    windows: list[int] | None = extra.pop("windows", None)
    if windows is None:
        raise ModelError(
            "a Swin V2's tensors do not tell its window",
            fix="name the architecture beside the file, as timm/swinv2_base_window8_256",
        )
    image = _swin_image(windows[0], windows[-1], arguments["patch_size"], len(depths))
    if period := _end_norm_period(tensors):
        extra["end_norm_period"] = period
    return _swin_plan("swinv2_tiny_window8_256", arguments, heads, windows[0], image, extra)


def _end_norm_period(tensors: Tensors) -> int:
    """After every how many blocks SwinV2-G's extra norm stands; 0 if there is none."""
    number = re.compile(r"layers\.\d+\.blocks\.(\d+)\.enorm\.(weight|bias)")
    places = sorted({int(m[1]) + 1 for n in tensors if (m := number.fullmatch(n))})
    return places[0] if places else 0
