"""Frozen features of images: as one vector each, or as any of a model's tensors by name.

Dimensions: B batch, P prefix tokens, C channels, h w the token grid, D the model's own embedding, K
classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.core.types import Batch, Features
from featdistill.data.loader import ordered_batches, plainly
from featdistill.data.sources import Source
from featdistill.data.views import EvalView
from featdistill.models.backbone import Backbone
from featdistill.models.modes import evaluating
from featdistill.models.pooling import PoolName, pool

WhatName = Literal["pooled", "mean", "map", "prefix", "logits"]

# (dimensions of one image's tensor, what it is), for records
MEANINGS: dict[WhatName, tuple[str, str]] = {
    "pooled": ("D", "as the model itself pools"),
    "mean": ("C", "mean of the map over its grid"),
    "map": ("C h w", "patch tokens"),
    "prefix": ("P C", "tokens before the patches"),
    "logits": ("K", "the model's own classifier"),
}
_OF_LAYERS: tuple[WhatName, ...] = ("mean", "map", "prefix")


@torch.no_grad()
def features_of(
    backbone: Backbone, batches: Iterable[Batch], layers: Sequence[int] = ()
) -> Iterator[tuple[Batch, Features]]:
    """Each batch with its features, on the backbone's device; afterwards every mode is as it was.

    Args:
        batches: of uint8 images, on the CPU.
        layers: indices of intermediate layers to return too.
    """
    device = backbone.mean.device
    with evaluating(backbone):
        for batch in batches:
            yield batch, backbone(batch.to(device).as_float().images, layers)


def extract(
    backbone: Backbone,
    source: Source,
    *,
    how: PoolName,
    batch_size: int,
    crop: float = 0.875,
    workers: int | None = None,
) -> Tensor:
    """Pooled features of all images, (n, C) float32 on the CPU; the backbone is left as it was."""
    view = EvalView(backbone.image_size[0], crop)
    loader = ordered_batches(source, view, batch_size=batch_size, workers=workers)
    found = features_of(backbone, plainly(loader))
    return torch.cat([pool(features, how).float().cpu() for _, features in found])


@dataclass(frozen=True)
class Part:
    """One named tensor among a model's features.

    Attributes:
        name: `map`, or `layers.3.map` of an intermediate layer.
        what: which of the features it is.
        layer: the intermediate layer, counted from 0; None: the model's output.
        shape: of one image.
    """

    name: str
    what: WhatName
    layer: int | None
    shape: tuple[int, ...]

    def of(self, features: Features) -> Tensor:
        """(B, *shape)."""
        return _take(features, self.what, self.layer)

    @property
    def meaning(self) -> str:
        """What it is, in words."""
        text = MEANINGS[self.what][1]
        if self.layer is not None:
            return f"{text}, after layer {self.layer}, before any norm"
        return text if self.what in ("pooled", "logits") else f"{text}, after the final norm"


def choose(backbone: Backbone, what: Sequence[WhatName], layers: Sequence[int]) -> tuple[Part, ...]:
    """The parts of a model's features that were asked for, each once, with their shapes.

    Args:
        what: parts of the model's output. Of each layer those among `mean`, `map` and `prefix` are
            taken; map and prefix where there is none of them.
        layers: intermediate layers; negative from the end.

    Raises:
        ModelError: the model lacks one of them.
    """
    name, count = backbone.origin.spec, len(backbone.layer_grids)
    if "prefix" in what and not backbone.num_prefix:
        raise ModelError(f"'{name}' has no prefix tokens", fix="leave prefix out of --what")
    if "logits" in what and not backbone.num_classes:
        raise ModelError(f"'{name}' has no classifier", fix="leave logits out of --what")
    strangers = [i for i in layers if not -count <= i < count]
    if strangers:
        raise ModelError(
            f"'{name}' has no layer {', '.join(map(str, strangers))}",
            expected=f"0 to {count - 1}, or -{count} to -1" if count else None,
            fix=None if count else "leave --layers out: it gives its output alone",
        )
    chosen: list[tuple[WhatName, int | None]] = [(w, None) for w in MEANINGS if w in what]
    positive = sorted({i % count for i in layers})
    each = [w for w in _OF_LAYERS if w in what]
    if not each:
        each = ["map", "prefix"] if backbone.num_prefix else ["map"]
    chosen += [(w, i) for i in positive for w in each]
    black = torch.zeros(1, 3, *backbone.image_size, dtype=torch.uint8)
    nowhere = torch.zeros(1, dtype=torch.int64)
    [(_, seen)] = features_of(backbone, [Batch((black,), None, nowhere, nowhere)], positive)
    return tuple(
        Part(w if i is None else f"layers.{i}.{w}", w, i, tuple(_take(seen, w, i).shape[1:]))
        for w, i in chosen
    )


def _take(features: Features, what: WhatName, layer: int | None) -> Tensor:
    source = features if layer is None else features.layers[layer]
    match what:
        case "mean":
            return source.map.mean((2, 3))
        case "map":
            return source.map
        case "prefix":
            return source.prefix
        case "pooled":
            return features.pooled
        case "logits":
            assert features.logits is not None
            return features.logits
