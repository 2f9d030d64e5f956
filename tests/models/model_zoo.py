"""Small models for the tests: real timm families, a few layers of a few channels."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from featdistill.models.backbone import Backbone, Origin, TimmBuild
from featdistill.models.students import build_fresh

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
    "window_size": 4,
}


def images(*shape: int, seed: int = 0) -> Tensor:
    """Uniform RGB noise in [0, 1]: (B, 3, side, side) from `images(B, side)`."""
    size = (shape[0], 3, shape[1], shape[-1])
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stir(module: nn.Module, seed: int = 0, size: float = 0.05) -> None:
    """Add noise to every weight, so that no norm, bias or scale is 0 or 1 by initialisation."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=rng))


def wrap(model: nn.Module, size: tuple[int, int], *, build: TimmBuild | None = None) -> Backbone:
    """A timm model behind the contract, with a mean and std of its own."""
    return Backbone(
        model,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        image_size=size,
        origin=Origin("test", "random"),
        build=build,
    ).eval()


def small(architecture: str, **arguments: object) -> Backbone:
    """A stirred small model of an architecture, rebuildable, in evaluation mode."""
    base = SWIN if architecture.startswith("swin") else VIT
    build = TimmBuild(architecture, {"num_classes": 0, **base, **arguments})
    backbone = build_fresh(build, spec=f"timm/{architecture}").eval()
    stir(backbone.model)
    return backbone


def small_vit(**arguments: object) -> Backbone:
    """DeiT's and DINO's plain ViT."""
    return small("vit_tiny_patch16_224", **arguments)


def small_beit(position: str = "shared-rpb", **arguments: object) -> Backbone:
    """A ViT student, as `students.vit_build` makes it but smaller."""
    defaults = {
        "init_values": 0.1,
        "global_pool": "token",
        "use_abs_pos_emb": position == "ape",
        "use_rel_pos_bias": position == "rpb",
        "use_shared_rel_pos_bias": position == "shared-rpb",
    }
    return small("beit_base_patch16_224", **{**defaults, **arguments})


def small_swin(**arguments: object) -> Backbone:
    """A Swin V2 student but smaller."""
    return small("swinv2_tiny_window8_256", global_pool="avg", **arguments)


def timm_beit(size: tuple[int, int], **arguments: object) -> nn.Module:
    """timm's own BEiT with a classifier, small."""
    return timm.create_model(
        "beit_base_patch16_224",
        **{**VIT, "img_size": size, "init_values": 0.1, "num_classes": 5, **arguments},
    )
