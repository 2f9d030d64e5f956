"""`featdistill bench`: what a part of the project costs, beside what it would cost done plainly."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from featdistill.config.commands import BenchConfig
from featdistill.diagnostics.attention_model import LayerAttention, ModelAttention, Tokens
from featdistill.diagnostics.attention_rows import Rows
from featdistill.diagnostics.capture import CapturedAttention, capture_attention
from featdistill.engine.runtime import limit_threads, pick_device
from featdistill.engine.tracking import say
from featdistill.models.backbone import Backbone
from featdistill.models.load import load_backbone
from featdistill.tasks.bench_landscape import LandscapeCost, bench_landscape


@dataclass(frozen=True)
class BenchResult:
    """Medians over rounds in which the three took turns.

    Attributes:
        plain: seconds of a forward pass that nobody watches.
        streamed, naive: as multiples of it; naive keeps all maps, and reduces them afterwards.
        streamed_bytes, naive_bytes: by how much each raises the peak of memory above the forward
            pass's.
    """

    plain: float
    streamed: float
    naive: float
    streamed_bytes: int
    naive_bytes: int


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


def run(config: BenchConfig) -> BenchResult | LandscapeCost:
    """Time and weigh it."""
    limit_threads()
    if config.what == "landscape":
        return bench_landscape(config)
    return _bench_attention(config)


@torch.no_grad()
def _bench_attention(config: BenchConfig) -> BenchResult:
    device = torch.device(pick_device(config.device))
    backbone = load_backbone(config.model, weights="random", image_size=config.image_size)
    backbone.to(device).eval()
    images = torch.rand(config.batch_size, 3, *backbone.image_size, device=device)
    trial = _Trial(backbone, images)
    trial.plain()  # memory that every way needs is not counted
    before = _peak(device)
    trial.streamed()
    streamed_bytes = _peak(device) - before
    trial.naive()  # needs more than the other, so that its peak is seen after it
    naive_bytes = _peak(device) - before
    rounds = [
        [_seconds(f, device) for f in (trial.plain, trial.streamed, trial.naive)]
        for _ in range(config.rounds)
    ]
    result = BenchResult(
        plain=statistics.median(r[0] for r in rounds),
        streamed=statistics.median(r[1] / r[0] for r in rounds),
        naive=statistics.median(r[2] / r[0] for r in rounds),
        streamed_bytes=streamed_bytes,
        naive_bytes=naive_bytes,
    )
    mib, naive_mib = streamed_bytes / 2**20, naive_bytes / 2**20
    say(
        f"{config.model}, {config.batch_size} images, {device}, {config.rounds} rounds in turn\n"
        f"plain forward pass   1.00 ({result.plain:.3f} s)\n"
        f"all of attention     {result.streamed:.2f}, peak memory +{mib:,.0f} MiB\n"
        f"all maps kept first  {result.naive:.2f}, peak memory +{naive_mib:,.0f} MiB"
    )
    return result


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak(device: torch.device) -> int:
    """Bytes of the most memory that was ever in use, of the device or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
