"""What of a model's features becomes an image's vector."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from model_zoo import images, small_beit, small_swin, small_vit, stir

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone, CustomBackbone, Origin
from featdistill.models.load import load_backbone
from featdistill.models.pooling import vector_of


def resnet() -> Backbone:
    backbone = load_backbone("timm/resnet18", weights="random", image_size=64)
    stir(backbone.model)
    return backbone


@torch.no_grad()
def test_both_is_cls_and_mean() -> None:
    backbone = small_vit(reg_tokens=2)
    seen = backbone(images(3, 32))
    got = vector_of(backbone, "both").of(seen)
    assert torch.equal(got[:, :32], seen.prefix[:, 0])
    torch.testing.assert_close(got[:, 32:], seen.map.flatten(2).mean(2))


@torch.no_grad()
@pytest.mark.parametrize("make", [small_vit, lambda: small_vit(global_pool="avg"), small_beit])
def test_last_layers_are_dinos_up_to_the_norms_affine(make: Callable[[], Backbone]) -> None:
    """DINO: `get_intermediate_layers(x, n)` norms every layer; CLS tokens are then joined."""
    backbone = make()
    model, x = backbone.model, images(2, 32)
    norm = backbone.layout.head_norm or model.norm
    vector = vector_of(backbone, "cls", 3)
    assert vector.layers == (0, 1)
    got = vector.of(backbone(x, vector.layers))
    taken = backbone(x, (0, 1, 2)).layers
    wanted = torch.cat([norm(taken[i].prefix[:, 0]) for i in range(3)], 1)
    plain = (wanted.view(2, 3, 32)[:, :2] - norm.bias) / norm.weight
    torch.testing.assert_close(got.view(2, 3, 32)[:, :2], plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got[:, 64:], wanted[:, 64:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mean_of_normed_tokens_not_norm_of_the_mean() -> None:
    backbone = small_vit()
    vector = vector_of(backbone, "mean", 2)
    seen = backbone(images(2, 32), vector.layers)
    tokens = seen.layers[1].map.flatten(2).transpose(1, 2)
    wanted = torch.nn.functional.layer_norm(tokens, (32,)).mean(1)
    torch.testing.assert_close(vector.of(seen)[:, :32], wanted)


@torch.no_grad()
def test_both_of_several_layers_is_dinov2s() -> None:
    backbone = small_vit()
    vector = vector_of(backbone, "both", 2)
    seen = backbone(images(2, 32), vector.layers)
    got = vector.of(seen)
    assert got.shape == (2, 3 * 32), "two CLS tokens, one mean"
    torch.testing.assert_close(got[:, 64:], seen.map.mean((2, 3)))


@torch.no_grad()
def test_stages_of_other_widths() -> None:
    for backbone, wanted in ((small_swin(), 32 + 64), (resnet(), 256 + 512)):
        vector = vector_of(backbone, "mean", 2)
        seen = backbone(images(2, backbone.image_size[0]), vector.layers)
        assert vector.of(seen).shape == (2, wanted)
    raw = seen.layers[3].map.mean((2, 3))
    torch.testing.assert_close(vector.of(seen)[:, :256], raw)  # a ResNet has no norm at its end


def custom() -> Backbone:
    return CustomBackbone(
        torch.nn.Conv2d(3, 4, 8, 8), image_size=16, origin=Origin("own", "random")
    )


@pytest.mark.parametrize(
    ("make", "how", "layers", "says"),
    [
        (small_swin, "cls", 1, r"no CLS token.*--pool mean"),
        (small_swin, "both", 2, r"no CLS token.*--pool mean"),
        (small_vit, "mean", 4, r"--layers 4.*has 3.*at most 3"),
        (small_vit, "model", 2, r"pools its output alone, not 2 layers.*--pool mean"),
        (custom, "mean", 2, r"gives none.*leave --layers out"),
    ],
)
def test_what_a_model_does_not_have(
    make: Callable[[], Backbone], how: str, layers: int, says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        vector_of(make(), how, layers)
