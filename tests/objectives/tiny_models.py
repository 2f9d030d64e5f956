"""Tiny teachers, students and batches for the objectives' tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featdistill.core.seeds import SampleStream
from featdistill.core.types import Batch
from featdistill.models.backbone import Backbone, TimmBuild
from featdistill.models.students import build_fresh

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
    "window_size": 4,
}


@torch.no_grad()
def stir(module: nn.Module, size: float = 0.1) -> None:
    """Add noise to every weight, so that no norm or bias is 1 or 0 by initialisation."""
    rng = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=rng))


def tiny(architecture: str, *, mean: float = 0.5, drop_path: float = 0.0, **arguments: object):
    """A stirred tiny model in evaluation mode."""
    base = SWIN if architecture.startswith("swin") else VIT
    build = TimmBuild(architecture, {"num_classes": 0, **base, **arguments})
    backbone: Backbone = build_fresh(
        build,
        spec=f"timm/{architecture}",
        drop_path=drop_path,
        mean=(mean, 0.5, 0.4),
        std=(0.2, 0.3, 0.25),
    )
    stir(backbone.model)
    return backbone.eval()


def teacher(**arguments: object) -> Backbone:
    """A plain ViT with another width, mean and number of heads than the student."""
    return tiny("vit_tiny_patch16_224", **{"embed_dim": 32, "mean": 0.3, **arguments})


def student(**arguments: object) -> Backbone:
    """A BEiT-style student with a shared relative position bias."""
    defaults = {
        "init_values": 0.1,
        "global_pool": "token",
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
    }
    return tiny("beit_base_patch16_224", **{**defaults, **arguments})


def batch(
    count: int = 4,
    side: int = 32,
    *,
    classes: int | None = None,
    seed: int = 0,
    step: int = 0,
    first: int = 0,
    views: int = 1,
) -> Batch:
    """Noise images with an address, and labels if there are classes."""
    rng = torch.Generator().manual_seed(seed)
    positions = torch.arange(first, first + count)
    labels: Tensor | None = None
    if classes is not None:
        labels = torch.randint(classes, (count,), generator=rng)
    return Batch(
        views=tuple(torch.rand(count, 3, side, side, generator=rng) for _ in range(views)),
        labels=labels,
        indices=positions,
        positions=positions,
        stream=SampleStream(seed, step, positions),
    )


def halves(whole: Batch, parts: int = 2) -> list[Batch]:
    """Micro-batches as the training loop makes them: split, each with its own address."""
    from dataclasses import replace

    assert whole.stream is not None
    seed, step = whole.stream.seed, whole.stream.step
    return [
        replace(part, stream=SampleStream(seed, step, part.positions))
        for part in whole.split(parts)
    ]
