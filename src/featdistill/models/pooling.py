"""Features as one vector an image: what is pooled, and of which layers.

Dimensions: B batch, P prefix tokens, C channels, h w the token grid, D all of a vector's channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.core.types import Features
from featdistill.models.backbone import Backbone

PoolName = Literal["mean", "cls", "both", "model"]


def pool(features: Features, how: PoolName) -> Tensor:
    """Features as one vector an image.

    Args:
        how: mean of the map (B, C), CLS (B, C), both one after the other (B, 2 C), or as the model
            itself pools.

    Raises:
        ModelError: there is no CLS token.
    """
    if how == "model":
        return features.pooled
    return _pool(features.map, features.prefix, features.prefix_names, how)


def _pool(map_: Tensor, prefix: Tensor, names: Sequence[str], how: PoolName) -> Tensor:
    mean = map_.mean((2, 3))
    if how == "mean":
        return mean
    if "cls" not in names:
        raise ModelError("the model has no CLS token to pool", fix="use --pool mean")
    cls = prefix[:, names.index("cls")]
    return cls if how == "cls" else torch.cat([cls, mean], dim=1)


@dataclass(frozen=True)
class Piece:
    """A part of an image's vector: one layer, pooled.

    Attributes:
        layer: an intermediate layer, counted from 0; None: the model's output.
        how: what of it.
        eps: of the layer norm without scale and shift that each token first goes through; None:
            it goes through none.
    """

    layer: int | None
    how: PoolName
    eps: float | None = None

    def of(self, features: Features) -> Tensor:
        """(B, C), or (B, 2 C)."""
        if self.layer is None:
            return pool(features, self.how)
        found = features.layers[self.layer]
        map_, prefix = found.map, found.prefix
        if self.eps is not None:
            shape = prefix.shape[-1:]
            map_ = F.layer_norm(map_.movedim(1, -1), shape, eps=self.eps).movedim(-1, 1)
            prefix = F.layer_norm(prefix, shape, eps=self.eps)
        return _pool(map_, prefix, features.prefix_names, self.how)


@dataclass(frozen=True)
class Vector:
    """How a model's features become one vector: pieces one after the other, the output last."""

    pieces: tuple[Piece, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The intermediate layers that the backbone has to return."""
        return tuple(p.layer for p in self.pieces if p.layer is not None)

    def of(self, features: Features) -> Tensor:
        """(B, D)."""
        return torch.cat([piece.of(features) for piece in self.pieces], dim=1)


def vector_of(backbone: Backbone, how: PoolName, layers: int = 1) -> Vector:
    """The vector of a model's last layers.

    The output is normed as the model norms it. Earlier layers are normed token by token before
    they are pooled, where the model ends in a layer norm, as DINO's `get_intermediate_layers` does;
    but without the final norm's scale and shift, which were learnt for the last layer (and which
    standardisation would take back).

    Args:
        how: `both` of several layers is the CLS tokens of all, and the mean of the last map
            (DINOv2's linear evaluation, `create_linear_input`).
        layers: how many of the last ones.

    Raises:
        ModelError: the model has no CLS token, or fewer layers, or does not pool them.
    """
    name = backbone.origin.spec
    if how in ("cls", "both") and "cls" not in backbone.prefix_names:
        raise ModelError(f"'{name}' has no CLS token to pool", fix="use --pool mean")
    last = Piece(None, how)
    if layers == 1:
        return Vector((last,))
    count = len(backbone.layer_grids)
    if layers > count:
        raise ModelError(
            f"--layers {layers}, but '{name}' " + (f"has {count}" if count else "gives none"),
            expected=f"at most {count}" if count else None,
            fix=None if count else "leave --layers out: it gives its output alone",
        )
    if how == "model":
        raise ModelError(
            f"'{name}' pools its output alone, not {layers} layers",
            fix="use --pool mean, cls or both",
        )
    earlier: PoolName = "mean" if how == "mean" else "cls"
    eps = _final_eps(backbone)
    before = (Piece(i, earlier, eps) for i in range(count - layers, count - 1))
    return Vector((*before, last))


def _final_eps(backbone: Backbone) -> float | None:
    """Epsilon of the layer norm in which the model ends, if it does."""
    norms = (backbone.layout.head_norm, getattr(backbone.model, "norm", None))
    return next((float(norm.eps) for norm in norms if isinstance(norm, nn.LayerNorm)), None)
