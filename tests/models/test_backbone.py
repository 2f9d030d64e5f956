"""`Features` against timm's own forward pass, family by family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
from model_zoo import VIT, images, small_beit, stir, timm_beit, wrap
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone
from featdistill.models.load import load_backbone

REGISTERS = ("cls", "reg1", "reg2", "reg3", "reg4")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class Family:
    """What is known of a family from its paper and timm's code, not from ours."""

    name: str
    size: int
    grid: tuple[int, int]
    width: int
    prefix: tuple[str, ...] = ()
    axes: str = "tokens"
    head_norm: Callable[[nn.Module], nn.Module] | None = None


FAMILIES = [
    Family("vit_tiny_patch16_224", 64, (4, 4), 192, ("cls",)),
    Family("deit_tiny_distilled_patch16_224", 64, (4, 4), 192, ("cls", "dist")),
    Family("beit", 32, (4, 4), 32, ("cls",), head_norm=lambda m: m.fc_norm),
    Family("eva02_tiny_patch14_224", 56, (4, 4), 192, ("cls",), head_norm=lambda m: m.fc_norm),
    Family("vit_small_patch16_dinov3", 64, (4, 4), 384, REGISTERS),
    Family("vit_small_patch14_reg4_dinov2", 56, (4, 4), 384, REGISTERS),
    Family("swin_tiny_patch4_window7_224", 64, (2, 2), 768, axes="NHWC"),
    Family("swinv2_tiny_window8_256", 64, (2, 2), 768, axes="NHWC"),
    Family("swinv2_cr_tiny_224", 64, (2, 2), 768, axes="NCHW"),
    Family("convnext_atto", 64, (2, 2), 320, axes="NCHW", head_norm=lambda m: m.head.norm),
    Family("resnet18", 64, (2, 2), 512, axes="NCHW"),
]


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda f: f.name)
def known(request: pytest.FixtureRequest) -> tuple[Family, Backbone]:
    family: Family = request.param
    if family.name == "beit":
        model = timm_beit((32, 32), use_abs_pos_emb=False, use_rel_pos_bias=True)
        backbone = wrap(model, (32, 32))
    else:
        backbone = load_backbone(f"timm/{family.name}", weights="random", image_size=family.size)
    stir(backbone.model)
    return family, backbone


def normalised(backbone: Backbone, x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in backbone.rgb)
    return (x - mean) / std


@torch.no_grad()
def test_features_are_those_of_timm(known: tuple[Family, Backbone]) -> None:
    family, backbone = known
    model, x = backbone.model, images(2, family.size)
    got = backbone(x)
    final = model.forward_features(normalised(backbone, x))
    if family.axes == "tokens":
        tokens = final if family.head_norm is None else family.head_norm(model)(final)
        p = len(family.prefix)
        torch.testing.assert_close(got.prefix, tokens[:, :p], **CLOSE)
        torch.testing.assert_close(got.map.flatten(2).transpose(1, 2), tokens[:, p:], **CLOSE)
    else:
        channels_first = final if family.axes == "NCHW" else final.permute(0, 3, 1, 2)
        if family.head_norm is not None:
            channels_first = family.head_norm(model)(channels_first)
        torch.testing.assert_close(got.map, channels_first, **CLOSE)
        assert got.prefix.shape == (2, 0, family.width)
    assert got.map.shape == (2, family.width, *family.grid)
    assert got.prefix_names == family.prefix


@torch.no_grad()
def test_pooled_and_logits_are_those_of_timm(known: tuple[Family, Backbone]) -> None:
    family, backbone = known
    model, x = backbone.model, images(2, family.size)
    got, final = backbone(x), model.forward_features(normalised(backbone, x))
    torch.testing.assert_close(got.pooled, model.forward_head(final, pre_logits=True), **CLOSE)
    if model.num_classes:
        torch.testing.assert_close(got.logits, model(normalised(backbone, x)), **CLOSE)
        assert got.logits.shape == (2, model.num_classes)
    else:
        assert got.logits is None


def test_facts(known: tuple[Family, Backbone]) -> None:
    family, backbone = known
    assert (backbone.width, backbone.grid) == (family.width, family.grid)
    assert (backbone.num_prefix, backbone.prefix_names) == (len(family.prefix), family.prefix)
    assert backbone.patch == family.size // family.grid[0]
    assert backbone.image_size == (family.size, family.size)
    assert not backbone.training


def test_normalisation_is_the_models_own(known: tuple[Family, Backbone]) -> None:
    family, backbone = known
    if family.name == "beit":
        expected = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    else:
        config = timm.create_model(family.name).pretrained_cfg
        expected = (config["mean"], config["std"])
    assert [pytest.approx(v) for v in expected] == [tuple(v) for v in backbone.rgb]


@torch.no_grad()
def test_layers_are_forward_intermediates(known: tuple[Family, Backbone]) -> None:
    family, backbone = known
    x = images(2, family.size)
    got = backbone(x, layers=(-1, 1))
    extra = {"return_prefix_tokens": True} if family.prefix else {}
    _, taken = backbone.model.forward_intermediates(
        normalised(backbone, x), indices=[1, len(backbone.layer_grids) - 1], **extra
    )
    assert list(got.layers) == [-1, 1]
    for index, value in ((1, taken[0]), (-1, taken[1])):
        map_, prefix = value if family.prefix else (value, None)
        torch.testing.assert_close(got.layers[index].map, map_, **CLOSE)
        assert got.layers[index].map.shape[2:] == backbone.layer_grids[index]
        if prefix is None:
            assert got.layers[index].prefix.shape == (2, 0, map_.shape[1])
        else:
            torch.testing.assert_close(got.layers[index].prefix, prefix, **CLOSE)


@torch.no_grad()
def test_asking_for_layers_changes_nothing_else(known: tuple[Family, Backbone]) -> None:
    family, backbone = known
    x = images(2, family.size)
    plain, asked = backbone(x), backbone(x, layers=(0,))
    for name in ("map", "prefix", "pooled"):
        torch.testing.assert_close(getattr(asked, name), getattr(plain, name), **CLOSE)
    assert plain.layers == {}


@pytest.mark.parametrize("beyond", [99, -99])
def test_layer_that_is_not_there(known: tuple[Family, Backbone], beyond: int) -> None:
    family, backbone = known
    last = len(backbone.layer_grids) - 1
    with pytest.raises(ModelError, match=f"layer {beyond}.*0 to {last}"):
        backbone(images(1, family.size), layers=(beyond,))


def test_wrong_image_size(known: tuple[Family, Backbone]) -> None:
    family, backbone = known
    x = images(1, 2 * family.size)
    if backbone.fixed_size:
        with pytest.raises(ModelError, match=f"{family.size}x{family.size}.*not {x.shape[-2]}x"):
            backbone(x)
    else:  # a convolution takes any size
        h, w = family.grid
        assert backbone(x).map.shape[2:] == (2 * h, 2 * w)


@torch.no_grad()
def test_beit_that_pools_cls_keeps_its_own_norm() -> None:
    backbone = small_beit("ape", global_pool="token", num_classes=4)
    x = images(2, 32)
    tokens = backbone.model.forward_features(normalised(backbone, x))
    got = backbone(x)
    torch.testing.assert_close(got.prefix[:, 0], tokens[:, 0], **CLOSE)
    torch.testing.assert_close(got.pooled, tokens[:, 0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "beit"])
def test_oblong_images(family: str) -> None:
    size = (32, 48)
    model = (
        timm.create_model("vit_tiny_patch16_224", **{**VIT, "img_size": size, "num_classes": 0})
        if family == "vit"
        else timm_beit(size)
    )
    backbone = wrap(model, size)
    got = backbone(images(2, *size), layers=(2,))
    assert backbone.grid == got.map.shape[2:] == got.layers[2].map.shape[2:] == (4, 6)
    tokens = model.forward_features(normalised(backbone, images(2, *size)))
    if family == "beit":
        tokens = model.fc_norm(tokens)
    torch.testing.assert_close(got.map[:, :, 1, 2], tokens[:, 1 + 1 * 6 + 2], **CLOSE)


def test_state_holds_the_models_weights_only() -> None:
    backbone = small_beit()
    assert set(backbone.state_dict()) == {f"model.{k}" for k in backbone.model.state_dict()}


@torch.no_grad()
def test_distilled_deit_in_training_mode_still_gives_one_set_of_logits() -> None:
    backbone = load_backbone(
        "timm/deit_tiny_distilled_patch16_224", weights="random", image_size=32
    )
    stir(backbone.model)
    evaluated = backbone(images(2, 32)).logits
    backbone.model.distilled_training = True
    torch.testing.assert_close(backbone.train()(images(2, 32)).logits, evaluated, **CLOSE)
