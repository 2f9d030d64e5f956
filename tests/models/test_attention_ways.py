"""The ways of attention are one mathematics, forwards and backwards."""

from __future__ import annotations

import copy

import pytest
import torch
from model_zoo import images, small_beit, small_swin, small_vit
from timm.models.beit import Attention
from torch import Tensor

from featdistill.diagnostics.capture import CapturedAttention, capture_attention
from featdistill.models.attention import Kind, suit_attention
from featdistill.models.backbone import Backbone

KINDS: tuple[Kind, ...] = ("naive", "fused", "lean")


def learn(backbone: Backbone, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The map, and the gradients of a loss that no two tokens share."""
    backbone.zero_grad()
    found = backbone(x)
    seen = torch.cat([found.map.flatten(1), found.prefix.flatten(1)], dim=1).float()
    weights = torch.linspace(-1, 1, seen.shape[1])
    (seen * weights).square().mean().backward()
    grads = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
    return found.map.detach(), grads


def gap(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each gradient, as a share of its largest number."""
    assert found.keys() == true.keys()
    return {n: float((found[n] - true[n]).abs().max() / true[n].abs().max()) for n in true}


@pytest.mark.parametrize("kind", ["fused", "lean"])
@pytest.mark.parametrize(
    "make",
    [small_beit, lambda: small_beit("rpb"), lambda: small_beit("ape"), small_vit, small_swin],
    ids=["shared-rpb", "rpb", "ape", "vit", "swin"],
)
def test_every_way_gives_the_same_in_float32(kind: Kind, make: object) -> None:
    plain = make()
    other, x = copy.deepcopy(plain), images(3, 32)
    suit_attention(plain, "naive")
    suit_attention(other, kind)
    map_, grads = learn(plain, x)
    other_map, other_grads = learn(other, x)
    torch.testing.assert_close(other_map, map_, rtol=1e-5, atol=1e-5)
    assert max(gap(other_grads, grads).values()) < 1e-4


def test_the_bias_table_learns_in_every_way() -> None:
    backbone, x = small_beit(), images(2, 32)
    for kind in KINDS:
        suit_attention(backbone, kind)
        grad = learn(backbone, x)[1]["model.rel_pos_bias.relative_position_bias_table"]
        assert float(grad.abs().max()) > 0


def test_lean_rounds_no_worse_than_autocast_does() -> None:
    """In bf16 both are compared with float32; a factor of 1.5 leaves room for chance."""
    x = images(8, 32)
    truth = small_beit()
    suit_attention(truth, "naive")
    true_map, true = learn(truth, x)
    errors = {}
    for kind in ("naive", "lean"):
        backbone = copy.deepcopy(truth)
        suit_attention(backbone, kind)
        with torch.autocast("cpu", torch.bfloat16):
            map_, grads = learn(backbone, x)
        errors[kind] = {"map": float((map_ - true_map).abs().mean())} | {
            n: float((grads[n] - true[n]).norm() / true[n].norm()) for n in true
        }
    table = "model.rel_pos_bias.relative_position_bias_table"
    for name in ("map", table, "model.blocks.0.attn.qkv.weight", "model.blocks.0.attn.q_bias"):
        assert errors["lean"][name] < 1.5 * errors["naive"][name] + 1e-3, name
        assert errors["lean"][name] < 0.05, name


def test_several_steps_stay_together() -> None:
    """Weights after five steps of SGD differ by less than a thousandth of what they moved."""
    start, x = small_beit().train(), images(4, 32)
    ends = {}
    for kind in ("naive", "lean"):
        backbone = copy.deepcopy(start)
        suit_attention(backbone, kind)
        optimizer = torch.optim.SGD(backbone.parameters(), lr=0.05)
        for _ in range(5):
            learn(backbone, x)
            optimizer.step()
        ends[kind] = torch.cat([p.detach().flatten() for p in backbone.parameters()])
    moved = (ends["naive"] - torch.cat([p.detach().flatten() for p in start.parameters()])).norm()
    assert float((ends["lean"] - ends["naive"]).norm() / moved) < 1e-3


def test_a_way_can_be_left_again_and_copies_keep_theirs() -> None:
    backbone = small_beit()
    suit_attention(backbone, "lean")
    twin = copy.deepcopy(backbone)
    suit_attention(backbone, "naive")
    kinds = [{type(m) for m in b.modules() if isinstance(m, Attention)} for b in (backbone, twin)]
    assert kinds[0] == {Attention}
    assert Attention not in kinds[1]


@torch.no_grad()
def test_attention_is_still_captured() -> None:
    backbone, x = small_beit(), images(2, 32)
    seen: dict[str, list[Tensor]] = {}
    for kind in KINDS:
        suit_attention(backbone, kind)
        kept: list[CapturedAttention] = []
        with capture_attention(backbone, kept.append):
            backbone(x)
        seen[kind] = [one.weights for one in kept]
    for kind in ("fused", "lean"):
        assert len(seen[kind]) == 3
        for a, b in zip(seen[kind], seen["naive"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_lean_keeps_its_type_where_autocast_changes_a_softmax(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As CUDA's does, which gives float32."""
    real = torch.softmax

    def softmax(x: Tensor, dim: int) -> Tensor:
        return real(x.float() if torch.is_autocast_enabled("cpu") else x, dim)

    monkeypatch.setattr(torch, "softmax", softmax)
    backbone = small_beit()
    suit_attention(backbone, "lean")
    with torch.autocast("cpu", torch.bfloat16):
        _, grads = learn(backbone, images(2, 32))
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_lean_refuses_a_second_derivative() -> None:
    backbone = small_beit()
    suit_attention(backbone, "lean")
    parameter = backbone.model.blocks[0].attn.qkv.weight
    loss = backbone(images(1, 32)).map.square().mean()
    (grad,) = torch.autograd.grad(loss, parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
