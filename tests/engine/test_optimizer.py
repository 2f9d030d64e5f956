"""What decays, and to which layer each parameter belongs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from featdistill.engine.optimizer import (
    Lars,
    adamw,
    decays,
    layer_groups,
    parameter_groups,
    set_rates,
    sgd,
)
from featdistill.engine.schedule import Schedule
from featdistill.models.students import build_student


def vit(position: str = "shared-rpb") -> nn.Module:
    return build_student(
        "vit-t", image_size=16, patch=4, width=32, depth=2, heads=2, position=position
    ).model


def swin() -> nn.Module:
    return build_student("swin-t", image_size=32, window=4).model


def swin_v1() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=32, patch_size=4, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4
    )


def deit() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3
    )


def resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(8, 8, 16, 16))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "vit-ape": lambda: vit("ape"),
    "vit-rpb": lambda: vit("rpb"),
    "swin": swin,
    "swin-v1": swin_v1,
    "deit": deit,
    "resnet": resnet,
    "projector": lambda: nn.Conv2d(4, 6, 1),
}


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
@pytest.mark.parametrize("name", MODELS)
def test_each_trainable_parameter_is_in_exactly_one_group(name: str, layer_decay: float) -> None:
    model = MODELS[name]()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    groups = parameter_groups([("m.", model)], weight_decay=0.05, layer_decay=layer_decay)
    names = [n for g in groups for n in g["names"]]
    expected = {f"m.{n}": p for n, p in model.named_parameters() if p is not frozen}
    assert sorted(names) == sorted(expected)
    for group in groups:
        assert group["weight_decay"] in (0.0, 0.05)
        assert 0 < group["lr_scale"] <= 1
        for n, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is expected[n]


@pytest.mark.parametrize("name", MODELS)
def test_biases_norms_and_tokens_do_not_decay(name: str) -> None:
    model = MODELS[name]()
    kept = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)
        for p in module.parameters()
    }
    for n, parameter in model.named_parameters():
        if id(parameter) in kept or parameter.ndim <= 1:
            assert not decays(n, parameter, model), n
        if n.rsplit(".", 1)[-1] in ("cls_token", "dist_token", "pos_embed"):
            assert not decays(n, parameter, model), n
        if any(part in n for part in ("cpb_mlp", "logit_scale")):
            assert not decays(n, parameter, model), n


@pytest.mark.parametrize("name", MODELS)
def test_matrices_decay(name: str) -> None:
    model = MODELS[name]()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and "cpb_mlp" not in path:
            assert decays(f"{path}.weight".lstrip("."), module.weight, model), path


def test_the_bias_table_decays_in_a_vit_only() -> None:
    for model, expected in ((vit(), True), (vit("rpb"), True), (swin_v1(), False)):
        tables = [(n, p) for n, p in model.named_parameters() if n.endswith("position_bias_table")]
        assert tables
        assert all(decays(n, p, model) is expected for n, p in tables)


@pytest.mark.parametrize(
    ("position", "name", "layer"),
    [
        ("shared-rpb", "cls_token", 0),
        ("shared-rpb", "patch_embed.proj.weight", 0),
        ("ape", "pos_embed", 0),
        ("shared-rpb", "blocks.0.attn.qkv.weight", 1),
        ("shared-rpb", "blocks.1.gamma_2", 2),
        ("rpb", "blocks.1.attn.relative_position_bias_table", 2),
        ("shared-rpb", "rel_pos_bias.relative_position_bias_table", 3),
        ("shared-rpb", "norm.weight", 3),
    ],
)
def test_layers_of_a_vit(position: str, name: str, layer: int) -> None:
    model = vit(position)
    assert name in dict(model.named_parameters())
    groups = layer_groups(model)
    assert groups.last == 3
    assert groups.layer_of(name) == layer
    assert groups.scale(name, 0.5) == 0.5 ** (3 - layer)


def test_layers_of_a_swin() -> None:
    """Stages of 2, 2, 6, 2 blocks: embedding 0, blocks 1-12, the rest 13."""
    model = swin()
    groups = layer_groups(model)
    names = [n for n, _ in model.named_parameters()]
    layers = {n: groups.layer_of(n) for n in names}
    assert groups.last == 13
    assert {layers[n] for n in names if n.startswith("patch_embed")} == {0}
    assert {layers[n] for n in names if n.startswith("norm.")} == {13}
    for stage, first in ((0, 1), (1, 3), (2, 5), (3, 11)):
        blocks = [f"layers.{stage}.blocks.{b}." for b in range({2: 6}.get(stage, 2))]
        for b, prefix in enumerate(blocks):
            assert {layers[n] for n in names if n.startswith(prefix)} == {first + b}
        down = {layers[n] for n in names if n.startswith(f"layers.{stage}.downsample")}
        assert down == (set() if stage == 0 else {first - 1}), "the last block before it"


def test_layers_of_deit_tokens() -> None:
    groups = layer_groups(deit())
    assert [groups.layer_of(n) for n in ("dist_token", "pos_embed")] == [0, 0]
    assert [groups.layer_of(n) for n in ("head.weight", "head_dist.weight")] == [3, 3]


def test_layers_of_another_family_grow_with_depth() -> None:
    groups = layer_groups(resnet())
    stages = [groups.layer_of(f"layer{i}.0.conv1.weight") for i in (1, 2, 3, 4)]
    assert groups.layer_of("conv1.weight") == 0
    assert 0 < stages[0] < stages[1] < stages[2] < stages[3] < groups.last
    assert groups.layer_of("fc.weight") == groups.last
    assert groups.scale("fc.weight", 0.5) == 1


def test_a_module_without_layers_is_not_slowed() -> None:
    groups = parameter_groups([("p.", nn.Conv2d(4, 6, 1))], weight_decay=0.1, layer_decay=0.5)
    assert {g["lr_scale"] for g in groups} == {1.0}


def test_rates_are_set_by_group() -> None:
    model = vit()
    groups = parameter_groups([("", model)], weight_decay=0.05, layer_decay=0.5)
    optimizer = adamw(groups, betas=(0.9, 0.999))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "rate 0 at first"
    set_rates(optimizer, Schedule(steps=2, warmup=0, peak=0.1, start=0.0, final=0.0), 0)
    found = {n: g["lr"] for g in optimizer.param_groups for n in g["names"]}
    assert found["norm.bias"] == pytest.approx(0.1)
    assert found["blocks.1.mlp.fc1.weight"] == pytest.approx(0.05)
    assert found["cls_token"] == pytest.approx(0.0125)


def test_a_generic_head_keeps_the_bodys_groups() -> None:
    """Or a distilled DeiT would be fine-tuned at the full rate in every layer."""
    from featdistill.models.classifier import build_classifier
    from featdistill.models.load import load_backbone

    body = load_backbone("timm/deit_tiny_distilled_patch16_224", weights="random", image_size=32)
    classifier = build_classifier(body, class_names=("a", "b"))
    groups = layer_groups(classifier.model)
    assert groups.layer_of("body.patch_embed.proj.weight") == 0
    assert groups.layer_of("body.blocks.3.attn.qkv.weight") == 4
    assert groups.layer_of("out.weight") == groups.last == 13


@pytest.mark.parametrize(
    "made",
    [
        lambda groups: adamw(groups, betas=(0.9, 0.99)),
        lambda groups: sgd(groups, momentum=0.9),
        lambda groups: Lars(groups, momentum=0.9),
    ],
    ids=["adamw", "sgd", "lars"],
)
@pytest.mark.parametrize("at", [0, 2])
def test_a_step_that_is_none_is_as_if_it_had_not_been(
    made: Callable[[list[dict[str, object]]], torch.optim.Optimizer], at: int
) -> None:
    """The first one too, before which torch's SGD has no momentum to leave alone."""
    ends = []
    for bad in ({at}, set[int]()):
        torch.manual_seed(0)
        module = nn.Linear(64, 64)
        optimizer = made(parameter_groups([("", module)], weight_decay=0.1))
        waste = [torch.full((64, 64), 7.0) for _ in range(50)]  # what memory may hold afterwards
        del waste
        for step in range(4 + len(bad)):
            wrong = step in bad
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, float("nan") if wrong else 0.5)
            optimizer.found_inf = torch.tensor(float(wrong))  # type: ignore[attr-defined]
            optimizer.step()
        ends.append([p.detach().clone() for p in module.parameters()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)
