"""Weights from one architecture to another, where the mathematics is the same."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone
from featdistill.models.positions import SHARED_TABLE, layer_table, tie_tables, untie_tables
from featdistill.models.students import PositionName
from featdistill.models.weights import load_exactly


def position_of(source: Backbone) -> PositionName:
    """The position scheme of a ViT, which a student that continues from it keeps."""
    names = source.model.state_dict().keys()
    if SHARED_TABLE in names:
        return "shared-rpb"
    if layer_table(0) in names:
        return "rpb"
    return "ape" if "pos_embed" in names else "none"


def continue_from(student: Backbone, source: Backbone) -> list[str]:
    """Start a student from another model's weights instead of random ones.

    The same architecture is copied as it is. A plain ViT (DINO, DeiT, MAE, CLIP without its
    pre-norm) becomes a BEiT-style student exactly: its key bias is left out (softmax does not see
    it), layer scale starts at 1, and the student's relative bias at 0 where the source has none.

    Returns:
        Lines that say what was carried over and what was not.

    Raises:
        ModelError: the shapes or the mathematics differ.
    """
    new, old = student.model, source.model
    state = dict(old.state_dict())
    notes: list[str] = []
    if isinstance(new, Beit) and isinstance(old, VisionTransformer):
        state = _vit_to_beit(old, state, notes)
    elif type(new) is not type(old):
        raise ModelError(
            f"a {type(new).__name__} student cannot start from the {type(old).__name__} "
            f"'{source.origin.spec}'",
            fix="use --student-init random, or a student of the teacher's family",
        )
    _same_mathematics(new, old, source.origin.spec)
    wanted = new.state_dict()
    if isinstance(new, Beit):
        _positions(new, state, notes)
        here, there = ("norm", "fc_norm") if "norm.weight" in wanted else ("fc_norm", "norm")
        if f"{here}.weight" not in state:  # a Beit that pools by the mean keeps its norm in fc_norm
            for part in ("weight", "bias"):
                state[f"{here}.{part}"] = state.pop(f"{there}.{part}")
    left = sorted(k for k in state if k not in wanted and k.startswith(_HEADS))
    if left:
        notes.append(f"left out: {', '.join(left)} (the head)")
    loaded = load_exactly(
        new, state, what=source.origin.spec, left_out=lambda name: name.startswith(_HEADS)
    )
    return [loaded, *notes]


_HEADS = ("head.", "head_dist.", "fc.", "fc_norm.")


def _vit_to_beit(
    old: VisionTransformer, state: dict[str, Tensor], notes: list[str]
) -> dict[str, Tensor]:
    strangers = [
        name
        for name, found in (
            ("register tokens", old.num_reg_tokens > 0),
            ("distillation token", getattr(old, "dist_token", None) is not None),
            ("pre-norm", "norm_pre.weight" in state),
            ("query-key norm", "blocks.0.attn.q_norm.weight" in state),
        )
        if found
    ]
    if strangers or old.cls_token is None:
        what = ", ".join(strangers) or "no CLS token"
        raise ModelError(
            f"a BEiT-style student cannot start from a ViT with {what}",
            fix="use --student-init random",
        )
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)
            out[name.replace("qkv.bias", "q_bias")] = q
            out[name.replace("qkv.bias", "v_bias")] = v
        elif ".ls1.gamma" in name or ".ls2.gamma" in name:
            out[name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = value
        else:
            out[name] = value
    for layer in range(len(old.blocks)):
        for gamma in ("gamma_1", "gamma_2"):
            out.setdefault(f"blocks.{layer}.{gamma}", torch.ones(old.embed_dim))
    notes.append("key biases left out (softmax is blind to them)")
    return out


def _positions(new: Beit, state: dict[str, Tensor], notes: list[str]) -> None:
    """Make the state's position tensors those that the student has."""
    wanted = new.state_dict()
    layers = len(new.blocks)
    tables = [SHARED_TABLE, *(layer_table(i) for i in range(layers))]
    wanted_tables = [name for name in tables if name in wanted]
    if SHARED_TABLE in wanted_tables and SHARED_TABLE not in state:
        tied, lost = tie_tables(state, layers)
        state |= tied
        if lost:
            notes.append(f"relative position bias: the layers' mean ({lost:.2g} off at most)")
    elif SHARED_TABLE in state and SHARED_TABLE not in wanted_tables and wanted_tables:
        state |= untie_tables(state, layers)
    if wanted_tables and not any(name in state for name in wanted_tables):
        state |= {name: torch.zeros_like(wanted[name]) for name in wanted_tables}
        notes.append("relative position bias starts at 0")
    dropped = [k for k in ("pos_embed", *tables) if k in state and k not in wanted]
    for name in dropped:
        del state[name]
    if "pos_embed" in dropped:
        notes.append("absolute position embedding left out (the student has none)")
    if not wanted_tables and any(name in tables for name in dropped):
        notes.append("relative position bias left out (the student has no place for it)")


def _same_mathematics(new: Any, old: Any, spec: str) -> None:
    """Raise ModelError where equal shapes would hide other heads, activations, norms or windows."""
    mine, theirs = _mathematics(new), _mathematics(old)
    differ = [name for name in mine if mine[name] != theirs.get(name)]
    if differ:
        said = "; ".join(f"{n}: {theirs.get(n)} instead of {mine[n]}" for n in differ)
        raise ModelError(
            f"the student cannot start from '{spec}', whose {', '.join(differ)} differ ({said})",
            fix="use --student-init random, or give the student the same",
        )


def _mathematics(model: Any) -> dict[str, Any]:
    """What a block computes beyond its tensors' shapes, over all blocks."""
    found: dict[str, set[Any]] = {}
    for module in model.modules():
        if hasattr(module, "attn") and hasattr(module, "mlp"):
            act = getattr(module.mlp, "act", None)
            act = type(act).__name__ if isinstance(act, nn.Module) else None
            for name, value in (
                ("heads", module.attn.num_heads),
                ("activation", act),
                ("norm's epsilon", getattr(module.norm1, "eps", None)),
                ("window", getattr(module, "window_size", None)),
            ):
                found.setdefault(name, set()).add(value)
    return found
