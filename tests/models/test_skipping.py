"""Drop path that skips what it drops: the same as multiplying by zero, but not computed."""

from __future__ import annotations

import copy

import pytest
import torch
from model_zoo import images, small_beit, small_swin, small_vit, stir
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.core.seeds import SampleStream
from featdistill.engine.batches import splitting_of
from featdistill.models.backbone import Backbone, TimmBuild
from featdistill.models.droppath import KeyedDropPath, skip_dropped
from featdistill.models.students import build_fresh

MAKERS = {"beit": small_beit, "vit": small_vit, "swin": small_swin}


def dropping(name: str, rate: float = 0.5) -> Backbone:
    build = MAKERS[name]().build
    assert build is not None
    made = build_fresh(build, spec="test", drop_path=rate)
    stir(made.model)
    return made.train()


def stream(samples: int, step: int = 3) -> SampleStream:
    return SampleStream(1, step, torch.arange(samples))


def learned(backbone: Backbone, x: Tensor) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_multiplication_by_what_the_kept_rows_get(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipping, x = dropping(name), images(6, 32)
    multiplying = copy.deepcopy(skipping)
    skip_dropped(skipping.model, skipping.slot)
    found = skipping(x, stream=stream(6)).map
    found.square().mean().backward()
    rows = [member.rows for member in skipping.slot.members]

    def fill(*_: object) -> None:
        for member, kept in zip(multiplying.slot.members, rows, strict=True):
            assert kept is not None
            member.factors = torch.zeros(6)
            member.factors[kept] = 6 / len(kept)

    monkeypatch.setattr(multiplying.slot, "fill", fill)
    expected = multiplying(x, stream=stream(6)).map
    expected.square().mean().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    true = learned(multiplying, x)
    for parameter, grad in learned(skipping, x).items():
        assert float((grad - true[parameter]).abs().max()) < 1e-4 * (
            1 + float(true[parameter].abs().max())
        ), parameter


@pytest.mark.parametrize(("rate", "kept"), [(0.5, 4), (0.1, 7), (0.95, 1)])
def test_a_fixed_number_is_kept_and_each_sample_as_often(rate: float, kept: int) -> None:
    backbone = dropping("vit", rate)
    skip_dropped(backbone.model, backbone.slot)
    member = backbone.slot.members[-1]
    counts = torch.zeros(8)
    steps = 800
    for step in range(steps):
        backbone.slot.fill(stream(8, step), torch.device("cpu"), "student")
        rows = member.rows
        assert rows is not None
        assert len(rows) == kept
        assert len(rows.unique()) == kept
        counts[rows] += 1
    share = kept / 8
    error = 4 * (share * (1 - share) / steps) ** 0.5
    assert float((counts / steps - share).abs().max()) < error + 1e-9


def test_what_is_dropped_is_not_computed() -> None:
    backbone, seen = dropping("beit"), []
    skip_dropped(backbone.model, backbone.slot)
    backbone.model.blocks[-1].mlp.register_forward_hook(lambda _m, x, _y: seen.append(len(x[0])))
    backbone(images(8, 32), stream=stream(8))
    backbone.eval()(images(8, 32))
    assert seen == [4, 8]


@torch.no_grad()
def test_evaluation_is_as_ever() -> None:
    backbone, x = dropping("swin").eval(), images(2, 32)
    expected = backbone(x).map
    skip_dropped(backbone.model, backbone.slot)
    assert torch.equal(backbone(x).map, expected)


def test_without_drop_path_there_is_nothing_to_do() -> None:
    backbone = small_vit()
    kinds = [type(m) for m in backbone.modules()]
    skip_dropped(backbone.model, backbone.slot)
    assert [type(m) for m in backbone.modules()] == kinds


def test_another_family_is_refused() -> None:
    build = TimmBuild("edgenext_xx_small", {"num_classes": 0})
    backbone = build_fresh(build, spec="test", drop_path=0.5, image_size=64)
    with pytest.raises(ModelError, match="cannot skip what it drops"):
        skip_dropped(backbone.model, backbone.slot)


def test_a_copy_has_rows_of_its_own() -> None:
    backbone = dropping("vit")
    skip_dropped(backbone.model, backbone.slot)
    twin = copy.deepcopy(backbone)
    twin.slot.fill(stream(4), torch.device("cpu"), "student")
    drops = [m for m in backbone.modules() if isinstance(m, KeyedDropPath)]
    assert isinstance(drops[0], nn.Module)
    assert all(m.rows is None for m in drops)
    assert all(m.rows is not None for m in twin.modules() if isinstance(m, KeyedDropPath))


def test_a_batch_is_not_cut_by_itself_where_that_would_drop_others() -> None:
    backbone = dropping("vit")
    assert splitting_of(backbone) == "any"
    skip_dropped(backbone.model, backbone.slot)
    assert splitting_of(backbone) == "whole"
