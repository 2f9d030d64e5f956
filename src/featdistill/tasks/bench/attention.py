"""`bench diagnose`: the measures of attention beside a forward pass that nobody watches."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from featdistill.config.commands import BenchConfig
from featdistill.diagnostics.attention_model import LayerAttention, ModelAttention, Tokens
from featdistill.diagnostics.attention_rows import Rows
from featdistill.diagnostics.capture import CapturedAttention, capture_attention
from featdistill.engine.runtime import pick_device
from featdistill.models.backbone import Backbone
from featdistill.models.load import load_backbone
from featdistill.tasks.bench.common import IMAGES, ratio, set_up, table, take_turns


@dataclass(frozen=True)
class AttentionCost:
    """Medians over rounds in which the three took turns.

    Attributes:
        plain: seconds of a forward pass that nobody watches.
        streamed, naive: as multiples of it; naive keeps all maps, and reduces them afterwards.
        streamed_bytes, naive_bytes: by how much each raises the peak of memory above the forward
            pass's.
        set_up: where and how it ran.
    """

    plain: float
    streamed: float
    naive: float
    streamed_bytes: int
    naive_bytes: int
    set_up: Mapping[str, Any]

    def lines(self) -> list[str]:
        at = self.set_up
        rows = [
            ("plain forward pass", "1.00", f"{self.plain:.3f} s"),
            ("all of attention", f"{self.streamed:.2f}", _more(self.streamed_bytes)),
            ("all maps kept first", f"{self.naive:.2f}", _more(self.naive_bytes)),
        ]
        head = (
            f"{at['model']}, {at['images']} images, {at['device']}, {at['rounds']} rounds in turn"
        )
        return [head, *table(rows)]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def _more(size: int) -> str:
    return f"peak memory +{size / 2**20:,.0f} MiB"


class _Trial:
    def __init__(self, backbone: Backbone, images: Tensor) -> None:
        self.backbone, self.images = backbone, images
        self.tokens = Tokens(backbone.grid, backbone.num_prefix, backbone.image_size)

    def plain(self) -> None:
        self.backbone(self.images)

    def streamed(self) -> None:
        with capture_attention(self.backbone, ModelAttention(self.tokens)):
            self.backbone(self.images)

    def naive(self) -> None:
        """All maps first, then each measure from the weights by itself."""
        kept: list[CapturedAttention] = []
        with capture_attention(self.backbone, kept.append):
            self.backbone(self.images)
        layouts = ModelAttention(self.tokens)
        for seen in kept:
            rows = layouts.rows(seen)
            for measure in LayerAttention(rows.layout, rows.heads).measures:
                measure.add(Rows(seen.weights, rows.layout))


@torch.no_grad()
def run(config: BenchConfig) -> AttentionCost:
    """Time and weigh it."""
    device = torch.device(pick_device(config.device))
    backbone = load_backbone(config.model, weights="random", image_size=config.image_size)
    backbone.to(device).eval()
    images = torch.rand(config.batch_size or IMAGES, 3, *backbone.image_size, device=device)
    trial = _Trial(backbone, images)
    trial.plain()  # memory that every way needs is not counted
    before = _peak(device)
    trial.streamed()
    streamed_bytes = _peak(device) - before
    trial.naive()  # needs more than the other, so that its peak is seen after it
    naive_bytes = _peak(device) - before
    works = {"plain": trial.plain, "streamed": trial.streamed, "naive": trial.naive}
    times = take_turns(works, rounds=config.rounds, device=device, warm=0)
    return AttentionCost(
        plain=times["plain"].median,
        streamed=ratio(times["streamed"], times["plain"]),
        naive=ratio(times["naive"], times["plain"]),
        streamed_bytes=streamed_bytes,
        naive_bytes=naive_bytes,
        set_up=set_up(device, model=config.model, images=len(images), rounds=config.rounds),
    )


def _peak(device: torch.device) -> int:
    """Bytes of the most memory that was ever in use, of the device or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
