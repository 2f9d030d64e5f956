"""From the nested contents of a training checkpoint to the one state dict that is wanted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.models.checkpoints.reasons import (
    DECODER,
    HEAD,
    TEACHER,
    TEXT,
    TEXT_HEAD,
    TEXT_TOWER,
)
from featdistill.models.checkpoints.tables import Rule, any_matches, convert

# Where projects keep their weights, the preferred first: of a self-distillation (DINO, iBOT, EsViT)
# the teacher is the model to use, as their own evaluation scripts do.
_BRANCHES = ("teacher", "student", "state_dict", "model", "module", "model_state", "net")
# DistributedDataParallel, torch.compile, and the one attribute of a training module
_PROCESS_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")


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
            Rule("head.*", None, HEAD),
            Rule("dino_head.*", None, HEAD),
            Rule("ibot_head.*", None, HEAD),
        ),
    ),
    _Nest(
        "encoder.",
        _VIT_OR_SWIN,
        (
            Rule("decoder.*", None, DECODER),
            Rule("feature_model.*", None, TEACHER),
        ),
    ),
    _Nest(
        "visual.trunk.",
        _VIT_OR_SWIN,
        (
            Rule("visual.head.mlp.*", None, TEXT_HEAD),
            *(Rule(pattern, None, TEXT) for pattern in TEXT_TOWER),
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
        also: those of them that could be taken instead: `student`, `state_dict_ema`.
    """

    tensors: dict[str, Tensor]
    path: str
    left_out: dict[str, list[str]]
    strangers: tuple[str, ...]
    total: int
    beside: tuple[str, ...]
    also: tuple[str, ...]


def unwrap(tree: Mapping[str, Any], branch: str | None, path: Path) -> Unwrapped:
    """Find the state dict in a checkpoint.

    Args:
        tree: the file's dictionaries.
        branch: the part to take: a name of the outermost dictionary (`NAME/NAME` of one inside
            it), or a prefix of the tensors' names, with its dot.
        path: of the file, for messages.

    Raises:
        ModelError: there is no such part, or nothing with named tensors.
    """
    prefix = branch if branch is not None and branch.endswith(".") else None
    asked = branch.split("/") if branch is not None and prefix is None else []
    branches: list[str] = []
    outer: dict[str, Any] = {}
    while inner := asked[0] if asked else _branch(tree):
        if asked and not _holds_weights(tree.get(asked.pop(0))):
            raise ModelError(
                f"'{path}' has no part '{branch}'",
                expected=", ".join("/".join([*branches, n]) for n in _parts(tree)) or "no part",
            )
        branches.append(inner)
        outer |= {name: value for name, value in tree.items() if name != inner}
        tree = tree[inner]
    tensors = {str(k): v for k, v in tree.items() if isinstance(v, Tensor)}
    if not tensors:
        parts = ["/".join([*branches, name]) for name in _parts(tree)]
        raise ModelError(
            f"'{path}' is not a checkpoint: it holds no named tensors"
            + (f" but in {', '.join(parts)}" if parts else _instead(tree)),
            fix=f"say which to take: {branch_option(parts[0])}" if parts else None,
        )
    also = tuple(n for n, v in outer.items() if _direct(v) * 2 > len(tensors))
    where = "".join(f"{name}/" for name in branches)
    return _inside(tensors, where, prefix, tuple(outer), also)


def _inside(
    tensors: dict[str, Tensor],
    path: str,
    prefix: str | None,
    beside: tuple[str, ...],
    also: tuple[str, ...],
) -> Unwrapped:
    """The model in a flat state dict: without wrappers, and without what is beside it."""
    total = len(tensors)
    left_out: dict[str, list[str]] = {}
    strangers: tuple[str, ...] = ()
    if prefix is not None:
        outside = [name for name in tensors if not name.startswith(prefix)]
        left_out = {"outside the chosen part": outside} if outside else {}
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        path += prefix
    while wrapper := _process_wrapper(tensors):
        tensors = {k.removeprefix(wrapper): v for k, v in tensors.items()}
        path += wrapper
    if nest := _nest(tensors):
        outer = {k: v for k, v in tensors.items() if not k.startswith(nest.prefix)}
        projection = outer.pop(nest.projection, None) if nest.projection else None
        converted = convert(outer, nest.beside)
        left_out, strangers = {**left_out, **converted.left_out}, converted.strangers
        tensors = {
            k.removeprefix(nest.prefix): v for k, v in tensors.items() if k.startswith(nest.prefix)
        }
        if nest.projection and projection is not None:
            tensors[nest.projection] = projection
            rows = len(projection) if projection.ndim else 0
            bias = nest.projection.replace("weight", "bias")
            tensors[bias] = projection.new_zeros(rows)  # timm's head has one
        path += nest.prefix
    return Unwrapped(tensors, path, left_out, strangers, total, beside, also)


def prefixes_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Prefixes under which there seem to be transformers: `base_encoder.`, `student.backbone.`"""
    expression = re.compile(r"(.+?\.)(?:layers\.\d+\.)?blocks\.\d+\.attn\.")
    return list(dict.fromkeys(m[1] for name in tensors if (m := expression.match(name))))


def _parts(tree: Mapping[str, Any]) -> list[str]:
    return [str(name) for name, value in tree.items() if _holds_weights(value)]


def branch_option(part: str) -> str:
    """How to ask for a part of a file."""
    return f"--teacher.branch {part} (of a single model: --model.branch, in Python: branch)"


def _instead(tree: Mapping[str, Any]) -> str:
    """What a file without weights holds, in words."""
    if "param_groups" in tree:
        return " (it is the state of an optimiser)"
    names = [str(name) for name in tree][:4]
    return f" (it holds {', '.join(names)})" if names else ""


def _branch(tree: Mapping[str, Any]) -> str | None:
    for name in _BRANCHES:
        inner = tree.get(name)
        if isinstance(inner, Mapping) and holds_tensors(inner):
            return name
    return None


def _holds_weights(value: Any) -> bool:
    """Whether something is a state dict, or a dictionary with one in it.

    An optimiser's state is none: it is numbered, or has `exp_avg` and the like under each weight.
    """
    if not isinstance(value, Mapping) or "param_groups" in value:
        return False
    return any(
        (isinstance(v, Tensor) and isinstance(k, str) and ("." in k or k == "weight"))
        or (isinstance(k, str) and _holds_weights(v))
        for k, v in value.items()
    )


def _direct(value: Any) -> int:
    """How many tensors something holds directly."""
    if not isinstance(value, Mapping):
        return 0
    return sum(isinstance(v, Tensor) for v in value.values())


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
