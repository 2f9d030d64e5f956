"""From the nested contents of a training checkpoint to the one state dict that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from featdistill.models.checkpoints.tables import Rule, any_matches, convert

# Where projects keep their weights, the preferred first: of a self-distillation (DINO, iBOT, EsViT)
# the teacher is the model to use, as their own evaluation scripts do.
_BRANCHES = ("teacher", "student", "state_dict", "model", "module", "model_state", "net")
_PROCESS_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile

_PROJECTION = "the projection head of the pre-training"
_TEXT = "the text tower"


@dataclass(frozen=True)
class _Nest:
    """A model inside another: its prefix, marks by which it is known, and what is beside it.

    `projection` is the name of a matrix outside that projects the model's pooled features.
    """

    prefix: str
    marks: tuple[str, ...]
    beside: tuple[Rule, ...]
    projection: str | None = None


_VIT_OR_SWIN = ("blocks.#.attn.*", "layers.#.blocks.#.attn.*")
_NESTS = (
    _Nest(
        "backbone.",
        _VIT_OR_SWIN,
        (
            Rule("head.*", None, _PROJECTION),
            Rule("dino_head.*", None, _PROJECTION),
            Rule("ibot_head.*", None, _PROJECTION),
        ),
    ),
    _Nest(
        "encoder.",
        _VIT_OR_SWIN,
        (
            Rule("decoder.*", None, "the decoder of the pre-training"),
            Rule("feature_model.*", None, "the frozen teacher of the pre-training"),
        ),
    ),
    _Nest(
        "visual.trunk.",
        _VIT_OR_SWIN,
        (
            Rule("visual.head.mlp.*", None, "the projection to the text tower's space"),
            Rule("text.*", None, _TEXT),
            Rule("transformer.*", None, _TEXT),
            Rule("token_embedding.*", None, _TEXT),
            Rule("ln_final.*", None, _TEXT),
            Rule("positional_embedding", None, _TEXT),
            Rule("text_projection", None, _TEXT),
            Rule("attn_mask", None, _TEXT),
            Rule("logit_scale", None, _TEXT),
            Rule("logit_bias", None, _TEXT),
        ),
        projection="visual.head.proj.weight",
    ),
)


@dataclass(frozen=True)
class Unwrapped:
    """A state dict, and how it was reached.

    Attributes:
        tensors: by name, prefixes removed.
        path: branches and prefixes that were entered, as `teacher/backbone.`.
        left_out: reason -> names beside the model.
        strangers: names beside the model that nobody knows.
        total: tensors of the branch, before anything was left out.
        beside: names beside the chosen branch, as `optimizer`.
    """

    tensors: dict[str, Tensor]
    path: str
    left_out: dict[str, list[str]]
    strangers: tuple[str, ...]
    total: int
    beside: tuple[str, ...]


def unwrap(tree: Mapping[str, Any], entered: str | None = None) -> Unwrapped:
    """Find the state dict in a checkpoint; empty if there is none.

    Args:
        entered: the branch that `tree` is already.
    """
    branches = [entered] if entered else []
    beside: tuple[str, ...] = ()
    while inner := _branch(tree):
        branches.append(inner)
        beside += tuple(name for name in tree if name != inner)
        tree = tree[inner]
    tensors = {str(k): v for k, v in tree.items() if isinstance(v, Tensor)}
    total = len(tensors)
    path = "".join(f"{name}/" for name in branches)
    left_out: dict[str, list[str]] = {}
    strangers: tuple[str, ...] = ()
    while prefix := _process_wrapper(tensors):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
        path += prefix
    if nest := _nest(tensors):
        outer = {k: v for k, v in tensors.items() if not k.startswith(nest.prefix)}
        projection = outer.pop(nest.projection, None) if nest.projection else None
        outside = convert(outer, nest.beside)
        left_out, strangers = outside.left_out, outside.strangers
        tensors = {
            k.removeprefix(nest.prefix): v for k, v in tensors.items() if k.startswith(nest.prefix)
        }
        if nest.projection and projection is not None and projection.ndim:
            tensors[nest.projection] = projection
            bias = nest.projection.replace("weight", "bias")
            tensors[bias] = projection.new_zeros(len(projection))  # timm's head has one
        path += nest.prefix
    return Unwrapped(tensors, path, left_out, strangers, total, beside)


def _branch(tree: Mapping[str, Any]) -> str | None:
    for name in _BRANCHES:
        inner = tree.get(name)
        if isinstance(inner, Mapping) and holds_tensors(inner):
            return name
    return None


def holds_tensors(tree: Mapping[str, Any]) -> bool:
    """Whether there is a tensor in a tree of dictionaries (which `read_tree` found to end)."""
    return any(
        isinstance(v, Tensor) or (isinstance(v, Mapping) and holds_tensors(v))
        for v in tree.values()
    )


def _process_wrapper(tensors: Mapping[str, Tensor]) -> str | None:
    # most, not all: a name that went astray must not change how the others are read
    for prefix in _PROCESS_WRAPPERS:
        if 2 * sum(name.startswith(prefix) for name in tensors) > len(tensors):
            return prefix
    return None


def _nest(tensors: Mapping[str, Tensor]) -> _Nest | None:
    for nest in _NESTS:
        if any(any_matches(nest.prefix + mark, tensors) for mark in nest.marks):
            return nest
    return None
