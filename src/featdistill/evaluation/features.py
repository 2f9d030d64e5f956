"""Frozen features of a whole source, as vectors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.core.types import Features
from featdistill.data.loader import ordered_batches, plainly
from featdistill.data.sources import Source
from featdistill.data.views import EvalView
from featdistill.models.backbone import Backbone

PoolName = Literal["mean", "cls", "model"]


def pool(features: Features, how: PoolName) -> Tensor:
    """Features as one vector an image: mean of the map (B, C), CLS (B, C), or the model's own."""
    match how:
        case "mean":
            return features.map.mean((2, 3))
        case "cls":
            if "cls" not in features.prefix_names:
                raise ModelError("the model has no CLS token to pool", fix="use --pool mean")
            return features.prefix[:, features.prefix_names.index("cls")]
        case "model":
            return features.pooled


@torch.no_grad()
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
    training = backbone.training
    backbone.eval()
    device = backbone.mean.device
    view = EvalView(backbone.image_size[0], crop)
    rows = []
    for batch in plainly(ordered_batches(source, view, batch_size=batch_size, workers=workers)):
        features = backbone(batch.to(device).as_float().images)
        rows.append(pool(features, how).float().cpu())
    backbone.train(training)
    return torch.cat(rows)
