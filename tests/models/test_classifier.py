"""A backbone under a classifier: its features kept, its head fresh and near zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from model_zoo import images, small, small_beit, small_swin, small_vit, stir
from torch import nn

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone
from featdistill.models.classifier import build_classifier
from featdistill.models.load import load_backbone
from featdistill.models.positions import SHARED_TABLE, layer_table
from featdistill.models.weights import tensors_hash

NAMES = ("cat", "dog", "hen")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def eva() -> Backbone:
    return small("eva02_tiny_patch14_224")


def mean_pooled_vit() -> Backbone:
    return small_vit(global_pool="avg")


def vit_with_registers() -> Backbone:
    return small_vit(reg_tokens=2)


def loaded(name: str) -> Backbone:
    backbone = load_backbone(f"timm/{name}", weights="random", image_size=64)
    stir(backbone.model)
    return backbone


VITS = [
    small_beit,
    lambda: small_beit("rpb"),
    lambda: small_beit("ape"),
    lambda: small_beit("rpb", global_pool="avg"),
    small_vit,
    mean_pooled_vit,
    vit_with_registers,
    eva,
]
VIT_NAMES = ["shared-rpb", "rpb", "ape", "fc-norm", "vit", "mean-vit", "registers", "eva"]
MAPS = [small_swin, *(lambda n=n: loaded(n) for n in ("resnet18", "convnext_atto"))]
MAP_NAMES = ["swin", "resnet", "convnext"]
GENERIC = [
    lambda: small("deit_tiny_distilled_patch16_224"),
    lambda: loaded("swinv2_cr_tiny_224"),
    lambda: loaded("edgenext_xx_small"),
]
GENERIC_NAMES = ["deit", "swinv2-cr", "edgenext"]


def classifier(backbone: Backbone, **options: object) -> Backbone:
    return build_classifier(backbone, class_names=NAMES, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("make", VITS, ids=VIT_NAMES)
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_vit_pools_the_tokens_before_the_final_norm(
    make: Callable[[], Backbone], pool: str
) -> None:
    backbone = make()
    side = backbone.image_size[0]
    x, last = images(2, side), len(backbone.layer_grids) - 1
    made = classifier(backbone, pool=pool)
    before = backbone(x, layers=(last,)).layers[last]
    got = made(x, layers=(last,))
    torch.testing.assert_close(got.layers[last].map, before.map, **CLOSE)
    torch.testing.assert_close(got.layers[last].prefix, before.prefix, **CLOSE)
    vector = before.map.mean((2, 3)) if pool == "mean" else before.prefix[:, 0]
    norms = [m for m in (made.model.norm, made.model.fc_norm) if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 1
    fresh = F.layer_norm(vector, vector.shape[-1:], eps=norms[0].eps)
    torch.testing.assert_close(got.pooled, fresh, **CLOSE)
    assert made.prefix_names == backbone.prefix_names


@torch.no_grad()
@pytest.mark.parametrize("make", MAPS, ids=MAP_NAMES)
def test_maps_keep_their_norm_and_pooling(make: Callable[[], Backbone]) -> None:
    backbone = make()
    x = images(2, backbone.image_size[0])
    made = classifier(backbone)
    torch.testing.assert_close(made(x).map, backbone(x).map, **CLOSE)
    torch.testing.assert_close(made(x).pooled, backbone(x).pooled, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("make", GENERIC, ids=GENERIC_NAMES)
def test_other_architectures_get_the_generic_head(make: Callable[[], Backbone]) -> None:
    backbone = make()
    x = images(2, backbone.image_size[0])
    made = classifier(backbone)
    features, got = backbone(x), made(x)
    torch.testing.assert_close(got.map, features.map, **CLOSE)
    torch.testing.assert_close(got.prefix, features.prefix, **CLOSE)
    mean = features.map.mean((2, 3))
    torch.testing.assert_close(got.pooled, F.layer_norm(mean, mean.shape[-1:], eps=1e-6), **CLOSE)
    assert got.prefix_names == features.prefix_names
    assert made.build is None
    assert (made.grid, made.width) == (backbone.grid, backbone.width)


@torch.no_grad()
def test_generic_head_over_cls() -> None:
    backbone = small("deit_tiny_distilled_patch16_224")
    x = images(2, 32)
    cls = backbone(x).prefix[:, 0]
    got = classifier(backbone, pool="cls")(x).pooled
    torch.testing.assert_close(got, F.layer_norm(cls, cls.shape[-1:], eps=1e-6), **CLOSE)


def test_generic_head_takes_the_drop_path_rate() -> None:
    made = build_classifier(loaded("swinv2_cr_tiny_224"), class_names=NAMES, drop_path=0.3)
    assert made.slot.layers > 0


@torch.no_grad()
def test_generic_classifier_still_gives_layers() -> None:
    backbone = loaded("swinv2_cr_tiny_224")
    x = images(1, 64)
    got = classifier(backbone)(x, layers=(1,)).layers[1].map
    torch.testing.assert_close(got, backbone(x, layers=(1,)).layers[1].map, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("make", VITS + MAPS + GENERIC, ids=VIT_NAMES + MAP_NAMES + GENERIC_NAMES)
def test_head_starts_near_zero_and_differs_by_seed_only(make: Callable[[], Backbone]) -> None:
    backbone = make()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    made = classifier(backbone, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    head = made.model.get_classifier()
    assert head.weight.shape[0] == made.num_classes == 3
    assert 0 < float(head.weight.abs().max()) < 1e-3
    assert not head.bias.any()
    assert made.class_names == NAMES
    logits = made(images(2, backbone.image_size[0])).logits
    assert logits.shape == (2, 3)
    assert float(logits.abs().max()) < 0.05
    assert tensors_hash(classifier(backbone, seed=4)) == tensors_hash(made)
    assert tensors_hash(classifier(backbone, seed=5)) != tensors_hash(made)


@pytest.mark.parametrize("make", VITS + MAPS + GENERIC, ids=VIT_NAMES + MAP_NAMES + GENERIC_NAMES)
def test_the_backbone_is_left_as_it_is(make: Callable[[], Backbone]) -> None:
    backbone = make()
    build, before, training = backbone.build, tensors_hash(backbone), backbone.training
    made = classifier(backbone)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert tensors_hash(backbone) == before
    assert (backbone.build, backbone.training) == (build, training)
    shared = {p.data_ptr() for p in made.parameters()} & {
        p.data_ptr() for p in backbone.parameters()
    }
    assert not shared


def test_shared_bias_is_copied_into_each_layer() -> None:
    backbone = small_beit("shared-rpb")
    shared = backbone.model.state_dict()[SHARED_TABLE]
    assert shared.any()
    made = classifier(backbone)
    state = made.model.state_dict()
    tables = [state[layer_table(i)] for i in range(3)]
    assert all(torch.equal(table, shared) for table in tables)
    assert len({t.data_ptr() for t in tables}) == 3  # learnt per layer from here on
    assert SHARED_TABLE not in state
    assert made.build.arguments["use_rel_pos_bias"] is True
    assert made.build.arguments["use_shared_rel_pos_bias"] is False


def test_final_norm_is_fresh() -> None:
    made = classifier(small_beit())
    assert isinstance(made.model.norm, torch.nn.Identity)
    assert torch.equal(made.model.fc_norm.weight, torch.ones(32))
    assert not made.model.fc_norm.bias.any()


def test_drop_path_rate() -> None:
    made = build_classifier(small_beit(), class_names=NAMES, drop_path=0.3)
    rates = [m.rate for m in made.model.modules() if hasattr(m, "slot")]
    assert rates == pytest.approx([0.15, 0.15, 0.3, 0.3])


@pytest.mark.parametrize("make", [small_swin, lambda: loaded("resnet18")])
def test_cls_of_a_model_without_one(make: Callable[[], Backbone]) -> None:
    with pytest.raises(ModelError, match=r"no CLS token.*mean"):
        classifier(make(), pool="cls")


@torch.no_grad()
def test_a_classifier_can_be_given_other_classes() -> None:
    first = classifier(small_beit())
    second = build_classifier(first, class_names=("a", "b")).eval()
    x = images(2, 32)
    assert second(x).logits.shape == (2, 2)
    torch.testing.assert_close(second(x).pooled, first(x).pooled, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("make", [small_beit, small_swin, small_vit])
def test_a_kept_head_is_the_same_classifier(make: Callable[[], Backbone]) -> None:
    first = classifier(make())
    stir(first.model)
    x = images(2, first.image_size[0])
    for head in ("auto", "keep"):
        second = classifier(first, head=head, drop_path=0.2, pool="mean")
        torch.testing.assert_close(second(x).logits, first(x).logits, **CLOSE)
        assert second.class_names == NAMES
    assert first(x).logits.abs().max() > 0.1, "not near zero, as a fresh one"
    assert classifier(first, head="fresh")(x).logits.abs().max() < 0.05
    other = build_classifier(first, class_names=("a", "b", "c"), head="auto").eval()
    assert other(x).logits.abs().max() < 0.05, "other classes, so a fresh one"


def test_a_head_that_cannot_be_kept() -> None:
    with pytest.raises(ModelError, match="has no classifier to keep; use --head fresh"):
        classifier(small_beit(), head="keep")
    first = classifier(small_beit())
    says = r"3 classes, which are not the data's 2 \(in one only: cat, dog, owl\); use --head fresh"
    with pytest.raises(ModelError, match=says):
        build_classifier(first, class_names=("hen", "owl"), head="keep")


@pytest.mark.parametrize("make", VITS + MAPS + GENERIC, ids=VIT_NAMES + MAP_NAMES + GENERIC_NAMES)
def test_normalisation_is_the_backbones(make: Callable[[], Backbone]) -> None:
    """Training and scoring both go through the classifier: its mean and std are the only ones."""
    backbone = make()
    backbone.mean.copy_(torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
    backbone.std.copy_(torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
    made = classifier(backbone)
    assert made.rgb == backbone.rgb
    if made.build is not None:
        assert classifier(made, head="keep").rgb == backbone.rgb
