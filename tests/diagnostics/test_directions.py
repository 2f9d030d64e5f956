"""Directions: as long as the weights, the same for equal names; and every way back is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.diagnostics.directions import Between, Filter, Plane, direction, filters


class Mixed(nn.Module):
    """A bit of everything that varies and of everything that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 8, 3, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.table = nn.Embedding(5, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
        self.scale = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)


VARIED = [
    "conv.weight",
    "up.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "head.weight",
]


def unit_norms(name: str, tensor: Tensor) -> list[float]:
    """By hand: the norm of what leads to each output channel."""
    if name != "up.weight":
        return [float(unit.norm()) for unit in tensor]
    # of 2 groups: inputs 0-2 lead to outputs 0-3, inputs 3-5 to outputs 4-7
    return [float(tensor[3 * g : 3 * g + 3, k].norm()) for g in range(2) for k in range(4)]


def test_what_varies_is_the_weights_of_layers() -> None:
    assert list(filters([("", Mixed())])) == VARIED
    assert list(filters([("a.", nn.Linear(2, 2)), ("b.", nn.Linear(2, 2))])) == [
        "a.weight",
        "b.weight",
    ]


def test_a_shared_weight_is_one() -> None:
    pair = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    pair[1].weight = pair[0].weight
    assert list(filters([("", pair)])) == ["0.weight"]


def test_nothing_to_vary_is_an_error() -> None:
    with pytest.raises(ModelError, match="no linear and no convolution"):
        filters([("", nn.LayerNorm(4))])


@pytest.mark.parametrize(
    "family", ["vit_tiny_patch16_224", "beit_base_patch16_224", "swinv2_tiny_window8_256"]
)
def test_positions_tables_and_tokens_of_timms_stay(family: str) -> None:
    small: dict[str, Any] = {"depth": 1} if "swin" not in family else {"depths": (1, 1, 1, 1)}
    model = timm.create_model(family, pretrained=False, num_classes=3, **small)
    weights = filters([("", model)])
    stay = {n for n, _ in model.named_parameters()} - set(weights)
    assert {"blocks.0.attn.qkv.weight", "head.weight"} <= set(weights) or "swin" in family
    for name in stay:
        last = name.rpartition(".")[2]
        one = dict(model.named_parameters())[name].ndim == 1
        assert one or last in (
            *("pos_embed", "cls_token", "relative_position_bias_table", "logit_scale"),
        ), name
    assert not any(n.endswith(("pos_embed", "cls_token", "bias_table")) for n in weights)


def test_each_unit_is_as_long_as_its_weights() -> None:
    weights = filters([("", Mixed())])
    for (name, weight), along in zip(
        weights.items(), direction(weights, seed=0, plane=0, axis=0), strict=True
    ):
        want = unit_norms(name, weight.parameter.detach())
        assert unit_norms(name, along) == pytest.approx(want, rel=1e-5), name


def test_a_unit_of_zeros_stays() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight[1:])
    [along] = direction(filters([("", layer)]), seed=0, plane=0, axis=0)
    assert along[0].norm() > 0
    assert torch.equal(along[1], torch.zeros(3))


def test_names_seed_and_shape_decide_and_nothing_else() -> None:
    """The raw direction: rows of equal norms are scaled by the ratio of the norms alone."""

    def one(model: nn.Module, **where: int) -> dict[str, Tensor]:
        weights = filters([("", model)])
        return dict(zip(weights, direction(weights, **where), strict=True))

    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    b = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 9))
    with torch.no_grad():
        b[2].weight.copy_(3 * a[2].weight)
    here: dict[str, int] = {"seed": 1, "plane": 0, "axis": 0}
    mine, other = one(a, **here), one(b, **here)
    torch.testing.assert_close(other["2.weight"], 3 * mine["2.weight"])
    torch.rand(7)  # no global generator takes part
    assert torch.equal(one(a, **here)["0.weight"], mine["0.weight"])
    for other_place in ({"seed": 2}, {"plane": 1}, {"axis": 1}):
        assert not torch.equal(one(a, **{**here, **other_place})["0.weight"], mine["0.weight"])
    flat = {n: v.flatten() / v.norm() for n, v in mine.items()}
    assert abs(float(flat["2.weight"] @ flat["0.weight"][:9])) < 0.95  # another name, another one


@given(step=st.floats(-2, 2), other=st.floats(-2, 2))
def test_a_point_does_not_depend_on_the_way_to_it(step: float, other: float) -> None:
    torch.manual_seed(0)
    weights = filters([("", model := Mixed())])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    along = [direction(weights, seed=0, plane=0, axis=a) for a in (0, 1)]
    with Plane(weights, *along) as plane:
        plane.go(step, other)
        there = {k: v.clone() for k, v in model.state_dict().items()}
        for x in (0.3, -7.0, 1e6):
            plane.go(x, -x)
        plane.go(step, other)
        assert all(torch.equal(v, there[k]) for k, v in model.state_dict().items())
        plane.go(0.0, 0.0)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    want = before["head.weight"] + step * along[0][-1] + other * along[1][-1]
    torch.testing.assert_close(there["head.weight"], want)
    for name in ("norm.weight", "cls_token", "pos_embed", "scale", "table.weight", "head.bias"):
        assert torch.equal(there[name], before[name])


def leave(walk: Callable[[], Any], *steps: float) -> None:
    with walk() as moving:
        moving.go(*steps)
        raise RuntimeError("on the way")


def test_after_an_exception_the_weights_are_as_before() -> None:
    model, other = Mixed(), Mixed()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = filters([("", model)])
    along = direction(weights, seed=0, plane=0, axis=0)
    with pytest.raises(RuntimeError, match="on the way"):
        leave(lambda: Plane(weights, along), 0.1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError, match="on the way"):
        leave(lambda: Between([("", model)], [("", other)]), 0.7)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_both_ends_of_the_way_between_are_exact() -> None:
    first, second = Mixed(), Mixed()
    second.norm.running_mean.fill_(3.0)  # type: ignore[union-attr]
    start = {k: v.clone() for k, v in first.state_dict().items()}
    end = second.state_dict()
    with Between([("", first)], [("", second)]) as way:
        for alpha, want in ((1.0, end), (0.0, start), (1.0, end)):
            way.go(alpha)
            assert all(torch.equal(v, want[k]) for k, v in first.state_dict().items())
        way.go(1.5)
        torch.testing.assert_close(
            first.head.weight, 1.5 * end["head.weight"] - 0.5 * start["head.weight"]
        )
        assert first.norm.running_mean[0] == 4.5  # type: ignore[index]


def test_another_architecture_is_named() -> None:
    a, b = Mixed(), Mixed()
    b.head = nn.Linear(8, 4)
    b.extra = nn.Linear(2, 2)
    with pytest.raises(ModelError) as caught:
        Between([("", a)], [("", b)], names=("A", "B"))
    for said in (
        "2 tensors in 'B' alone (extra.bias, extra.weight)",
        "head.weight (3, 8) and (4, 8)",
    ):
        assert said in str(caught.value)


def test_a_shared_bias_and_one_for_each_layer_get_a_hint() -> None:
    def beit(**how: bool) -> nn.Module:
        return timm.create_model(
            "beit_base_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=32, **how
        )

    shared = beit(use_shared_rel_pos_bias=True, use_rel_pos_bias=False)
    each = beit(use_shared_rel_pos_bias=False, use_rel_pos_bias=True)
    with pytest.raises(ModelError, match="shares its position bias among all layers"):
        Between([("", shared)], [("", each)])


def test_spread_is_the_opposite_of_by_unit() -> None:
    up = nn.ConvTranspose2d(6, 8, 3, groups=2)
    weight = Filter(up.weight, groups=2)
    marked = torch.ones_like(up.weight) * weight.spread(torch.arange(8.0))
    assert torch.equal(weight.by_unit(marked), torch.arange(8.0)[:, None].expand(8, 27))
