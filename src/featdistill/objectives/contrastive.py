"""SimCLR: two views of an image agree, and differ from all others (Chen et al. 2020)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featdistill.core.seeds import seeded_globals
from featdistill.core.types import Batch, Loss, Splitting
from featdistill.models.backbone import Backbone

_SECOND = 1 << 32  # added to the position of a sample's second view


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent of two (B, D) sets of embeddings, and the share of views whose partner is nearest."""
    z = F.normalize(torch.cat([a, b]).float(), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    n = len(a)
    partner = torch.cat([torch.arange(n, 2 * n), torch.arange(n)]).to(z.device)
    hit = (similarity.argmax(1) == partner).float().mean()
    return F.cross_entropy(similarity, partner), hit.detach()


class SimCLR(nn.Module):
    """A backbone and its projection head; of both, the backbone is what is kept.

    The CLS token (or, without one, the mean of the map) is what is projected. All negatives come
    from the process's own batch, hence one process and no micro-batches.
    """

    splitting: Splitting = "whole"

    def __init__(
        self, backbone: Backbone, *, temperature: float, hidden: int, projection: int, seed: int
    ) -> None:
        super().__init__()
        self.backbone, self.temperature = backbone, temperature
        with seeded_globals("projection", seed):
            self.head = nn.Sequential(
                nn.Linear(backbone.width, hidden),
                nn.LayerNorm(hidden),
                nn.GELU(),
                nn.Linear(hidden, projection),
            )

    def forward(self, batch: Batch) -> Loss:
        a, b = batch.views
        stream = batch.stream
        if stream is not None:  # the second views are samples of their own
            positions = torch.cat([stream.positions, stream.positions + _SECOND])
            stream = replace(stream, positions=positions)
        features = self.backbone(torch.cat([a, b]), stream=stream)
        vector = features.map.mean((2, 3))
        if "cls" in features.prefix_names:
            vector = features.prefix[:, features.prefix_names.index("cls")]
        z = self.head(vector)
        first, second = z.chunk(2)
        loss, hit = nt_xent(first, second, self.temperature)
        return Loss(loss, {"agreement": hit})
