"""A model's sizes, read from its tensors.

Each size is what most tensors agree on, so that one damaged tensor is found out by the others
instead of changing the model that they are loaded into.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isqrt

from torch import Tensor

from featdistill.core.errors import ModelError

Tensors = Mapping[str, Tensor]

# Widths whose heads do not have 64 channels in the models that people use: MAE's and CLIP's ViT-H,
# SigLIP's SO400M, open_clip's g and G.
_ODD_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


def vote(values: Iterable[int], what: str) -> int:
    """The value that occurs most often.

    Raises:
        ModelError: there is none.
    """
    counted = Counter(values)
    if not counted:
        raise ModelError(f"the checkpoint does not tell its {what}: no tensor shows it")
    return counted.most_common(1)[0][0]


def count_of(tensors: Tensors, pattern: str, what: str) -> int:
    """How many numbered parts there are: `pattern` has one group, the number.

    A number with less than half of the names that the others have is an accident, not a part.
    """
    expression = re.compile(pattern)
    counted = Counter(int(m[1]) for name in tensors if (m := expression.match(name)))
    if not counted:
        raise ModelError(f"the checkpoint has no {what}")
    usual = max(counted.values())
    real = [number for number, names in counted.items() if 2 * names >= usual]
    return max(real) + 1


def need(tensors: Tensors, name: str, dimensions: int) -> Tensor:
    """A tensor that must be there, with so many dimensions.

    Raises:
        ModelError: it is missing or misshapen.
    """
    value = tensors.get(name)
    if value is None:
        raise ModelError(f"1 missing ({name})")
    if value.ndim != dimensions:
        raise ModelError(
            f"1 of another shape ({name} {tuple(value.shape)})", expected=f"{dimensions} dimensions"
        )
    return value


def patch_of(tensors: Tensors, name: str = "patch_embed.proj.weight") -> int:
    """Side of a patch in pixels, from the patch embedding (C, 3, p, p)."""
    kernel = need(tensors, name, 4)
    _, channels, height, width = kernel.shape
    if height != width or channels != 3:
        raise ModelError(
            f"1 of another shape ({name} {tuple(kernel.shape)})",
            expected="(channels, 3 for RGB, patch, patch)",
        )
    return int(height)


def width_of(tensors: Tensors, pattern: str) -> int:
    """Channels, from the 1-d tensors (norms' weights and biases) that match an expression."""
    expression = re.compile(pattern)
    return vote(
        (len(v) for name, v in tensors.items() if v.ndim == 1 and expression.fullmatch(name)),
        "width",
    )


def hidden_of(tensors: Tensors, pattern: str) -> int:
    """Hidden channels of an MLP: rows of fc1 and columns of fc2, over all blocks.

    `pattern` matches `...mlp.` with what follows in a group.
    """
    expression = re.compile(pattern)
    values = []
    for name, value in tensors.items():
        found = expression.fullmatch(name)
        if found is None:
            continue
        if found[1].startswith("fc1") and value.ndim:
            values.append(value.shape[0])
        elif found[1] == "fc2.weight" and value.ndim == 2:
            values.append(value.shape[1])
    return vote(values, "MLP's width")


def heads_of(width: int, channels: int = 64) -> int:
    """Attention heads by the family's rule, but for widths that are known to break it."""
    if channels == 64 and width in _ODD_HEADS:
        return _ODD_HEADS[width]
    return max(1, width // channels)


def classes_of(tensors: Tensors, head: str) -> int:
    """Classes of a linear (or 1x1) head `head.weight`, `head.bias`; 0 if there is none.

    Raises:
        ModelError: weight and bias disagree, or the bias stands alone.
    """
    weight, bias = tensors.get(f"{head}.weight"), tensors.get(f"{head}.bias")
    if weight is None and bias is None:
        return 0
    belong = weight is not None and weight.ndim in (2, 4)
    if belong and bias is not None:
        belong = weight is not None and tuple(bias.shape) == (len(weight),)
    if weight is None or not belong:
        shapes = ", ".join(
            f"{head}.{part} {'missing' if value is None else tuple(value.shape)}"
            for part, value in (("weight", weight), ("bias", bias))
        )
        raise ModelError(f"the classifier's tensors do not belong together ({shapes})")
    return len(weight)


def grid_side(rows: int, prefix: Sequence[str], name: str) -> int:
    """Side of the token grid, from an absolute position embedding's rows.

    Raises:
        ModelError: the rows are no square plus the prefix.
    """
    side = isqrt(max(0, rows - len(prefix)))
    if side == 0 or side * side + len(prefix) != rows:
        raise ModelError(
            f"{name} has {rows} positions, which is no square grid beside the prefix tokens that "
            f"were found ({', '.join(prefix) or 'none'})",
            expected="a square, and one position for each of cls_token and dist_token",
        )
    return side


def window_side(rows: int, extra: int, name: str) -> int:
    """Side of the window of a relative position bias table of (2w-1)^2 rows and some extra ones.

    Raises:
        ModelError: the rows fit no window.
    """
    side = isqrt(max(0, rows - extra))
    if side * side + extra != rows or side % 2 == 0:
        raise ModelError(
            f"1 of another shape ({name} with {rows} rows)",
            expected=f"(2w-1)^2{f' + {extra}' if extra else ''} rows for a window of side w",
        )
    return (side + 1) // 2
