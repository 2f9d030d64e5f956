"""A frozen backbone under a linear layer, as one timm model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from model_zoo import images, small, small_beit, small_swin, small_vit, stir

from featdistill.models.backbone import Backbone
from featdistill.models.export import export_timm
from featdistill.models.load import load_backbone
from featdistill.models.pooling import pool
from featdistill.models.probed import probed_classifier
from featdistill.models.weights import tensors_hash

NAMES = ("cat", "dog", "hen")


def loaded(name: str) -> Backbone:
    backbone = load_backbone(f"timm/{name}", weights="random", image_size=64)
    stir(backbone.model)
    return backbone


def clip() -> Backbone:
    """With a projection in the place of a classifier."""
    vit = small("vit_base_patch16_clip_224", num_classes=16, global_pool="token")
    with torch.no_grad():
        vit.model.head.bias.zero_()
    build = vit.build
    return Backbone(
        vit.model,
        mean=vit.rgb[0],
        std=vit.rgb[1],
        image_size=vit.image_size,
        origin=vit.origin,
        build=build,
    ).eval()


MODELS: dict[str, Callable[[], Backbone]] = {
    "vit": small_vit,
    "mean-vit": lambda: small_vit(global_pool="avg"),
    "registers": lambda: small_vit(reg_tokens=2),
    "siglip": lambda: small_vit(global_pool="map", class_token=False),
    "beit": small_beit,
    "beit-mean": lambda: small_beit("rpb", global_pool="avg"),
    "eva": lambda: small("eva02_tiny_patch14_224"),
    "swin": small_swin,
    "resnet": lambda: loaded("resnet18"),
    "convnext": lambda: loaded("convnext_atto"),
    "clip": clip,
    "deit": lambda: small("deit_tiny_distilled_patch16_224"),
}
CASES = [
    *((name, "mean", name not in ("convnext", "deit")) for name in MODELS),
    *((name, "model", name != "deit") for name in MODELS),
    *((name, "cls", True) for name in ("vit", "mean-vit", "registers", "beit", "eva", "clip")),
    ("vit", "both", False),
]


def layer(backbone: Backbone, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        width = pool(backbone(images(1, backbone.image_size[0])), how).shape[1]
    return torch.randn(3, width, generator=rng), torch.randn(3, generator=rng)


@torch.no_grad()
@pytest.mark.parametrize(("name", "how", "possible"), CASES, ids=lambda v: str(v))
def test_the_classifiers_logits_are_the_layers(name: str, how: str, possible: bool) -> None:
    backbone = MODELS[name]()
    before = tensors_hash(backbone)
    weight, bias = layer(backbone, how)
    made = probed_classifier(backbone, weight, bias, how=how, class_names=NAMES)
    assert tensors_hash(backbone) == before
    assert (made is not None) == possible
    if made is None:
        return
    x = images(5, backbone.image_size[0], seed=1)
    wanted = pool(backbone(x), how) @ weight.T + bias
    torch.testing.assert_close(made(x).logits, wanted, rtol=1e-3, atol=1e-3)
    assert made.class_names == NAMES


@torch.no_grad()
@pytest.mark.parametrize(("name", "how"), [("vit", "mean"), ("beit", "cls"), ("clip", "model")])
def test_it_survives_an_export(tmp_path: Path, name: str, how: str) -> None:
    backbone = MODELS[name]()
    weight, bias = layer(backbone, how)
    made = probed_classifier(backbone, weight, bias, how=how, class_names=NAMES)
    assert made is not None
    folder = export_timm(made, tmp_path / "export").folder
    x = images(3, 32)
    again = load_backbone(str(tmp_path))
    torch.testing.assert_close(again(x).logits, made(x).logits, rtol=1e-4, atol=1e-4)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(
        plain((x - made.mean) / made.std), made(x).logits, rtol=1e-4, atol=1e-4
    )


def test_a_model_that_is_not_timms(tmp_path: Path) -> None:
    backbone = small_vit()
    backbone.build = None
    weight, bias = layer(backbone, "mean")
    assert probed_classifier(backbone, weight, bias, how="mean", class_names=NAMES) is None
