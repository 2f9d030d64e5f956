"""Drop path whose masks depend on (seed, step, layer, position) only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import images, small_beit, small_swin, stir
from timm.layers import DropPath
from torch import Tensor, nn

from featdistill.core.seeds import SampleStream
from featdistill.models.backbone import Backbone, TimmBuild
from featdistill.models.classifier import build_classifier
from featdistill.models.droppath import DropPathSlot, KeyedDropPath, key_drop_path
from featdistill.models.load import load_backbone, resize
from featdistill.models.students import build_fresh

RATE = 0.5


def stream(positions: Tensor, seed: int = 1, step: int = 3) -> SampleStream:
    return SampleStream(seed, step, positions)


def masks(positions: Tensor, *, seed: int = 1, step: int = 3, name: str = "student") -> Tensor:
    """(layers, B) factors that three layers multiply their branch by."""
    slot = DropPathSlot()
    layers = [KeyedDropPath(RATE, slot).train() for _ in range(3)]
    slot.fill(stream(positions, seed, step), torch.device("cpu"), name)
    return torch.stack([layer(torch.ones(len(positions), 2, 2))[:, 0, 0] for layer in layers])


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=30)
def test_micro_batches_join_to_the_masks_of_the_batch(
    sizes: list[int], seed: int, step: int
) -> None:
    positions = torch.arange(sum(sizes))
    joined = [masks(part, seed=seed, step=step) for part in positions.split(sizes)]
    assert torch.equal(torch.cat(joined, dim=1), masks(positions, seed=seed, step=step))


def test_masks_follow_the_position_not_the_row() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(masks(order), masks(torch.arange(64))[:, order])


@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 4}, {"name": "teacher"}])
def test_masks_differ_by_seed_step_and_model(other: dict[str, object]) -> None:
    positions = torch.arange(64)
    assert not torch.equal(masks(positions, **other), masks(positions))


def test_masks_differ_by_layer() -> None:
    first, second, third = masks(torch.arange(64))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_rate_and_scaling(rate: float) -> None:
    samples = 20_000
    slot = DropPathSlot()
    layer = KeyedDropPath(rate, slot).train()
    slot.fill(stream(torch.arange(samples)), torch.device("cpu"), "student")
    got = layer(torch.ones(samples, 1))
    assert got.unique().tolist() == [0.0, pytest.approx(1 / (1 - rate))]
    error = 4 * (rate * (1 - rate) / samples) ** 0.5
    assert float((got == 0).float().mean()) == pytest.approx(rate, abs=error)


def test_whole_samples_are_dropped() -> None:
    slot = DropPathSlot()
    layer = KeyedDropPath(RATE, slot).train()
    slot.fill(stream(torch.arange(16)), torch.device("cpu"), "student")
    got = layer(torch.ones(16, 3, 5)).flatten(1)
    assert torch.equal(got.min(1).values, got.max(1).values)


def test_evaluation_is_the_identity_unless_always() -> None:
    x = torch.ones(64, 1)
    for always in (False, True):
        slot = DropPathSlot(always=always)
        layer = KeyedDropPath(RATE, slot).eval()
        slot.fill(stream(torch.arange(64)), torch.device("cpu"), "teacher")
        assert torch.equal(layer(x), x) is not always


def test_without_an_address_torch_draws() -> None:
    layer = KeyedDropPath(RATE, DropPathSlot()).train()
    torch.manual_seed(5)
    first = layer(torch.ones(64, 1))
    torch.manual_seed(5)
    assert torch.equal(layer(torch.ones(64, 1)), first)
    assert not torch.equal(layer(torch.ones(64, 1)), first)


def test_every_drop_path_of_a_model_is_replaced() -> None:
    model = nn.Sequential(DropPath(0.0), nn.Sequential(DropPath(0.1), DropPath(0.2)), nn.ReLU())
    slot = DropPathSlot()
    key_drop_path(model, slot)
    assert isinstance(model[0], nn.Identity)
    assert [(m.rate, m.layer) for m in model[1]] == [(0.1, 0), (0.2, 1)]
    assert (slot.layers, slot.rate) == (2, 0.2)


def dropping(backbone: Backbone, rate: float = RATE) -> Backbone:
    assert backbone.build is not None
    made = build_fresh(backbone.build, spec="test", drop_path=rate)
    stir(made.model)
    return made.train()


def addressed(backbone: Backbone, x: Tensor, positions: Tensor, **key: int) -> Tensor:
    return backbone(x, stream=stream(positions, **key)).map


@torch.no_grad()
@pytest.mark.parametrize("make", [small_beit, small_swin])
def test_model_is_invariant_to_micro_batches(make: object) -> None:
    backbone = dropping(make())
    x, positions = images(8, 32), torch.arange(8)
    whole = addressed(backbone, x, positions)
    parts = [addressed(backbone, x[i : i + 2], positions[i : i + 2]) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(addressed(backbone, x, positions, step=4), whole, atol=1e-3)
    assert torch.equal(backbone.eval()(x).map, addressed(backbone, x, positions))


@torch.no_grad()
def test_always_drops_in_evaluation() -> None:
    backbone = load_backbone(
        "timm/vit_tiny_patch16_224",
        weights="random",
        image_size=32,
        drop_path=0.5,
        always_drop_path=True,
    )
    stir(backbone.model)
    x, positions = images(4, 32), torch.arange(4)
    first = addressed(backbone, x, positions)
    assert torch.equal(addressed(backbone, x, positions), first)
    assert not torch.allclose(addressed(backbone, x, positions, step=4), first, atol=1e-3)


def is_addressed(backbone: Backbone, side: int = 32) -> bool:
    """Whether the masks come from the address, and not from torch's global generator."""
    x, positions = images(8, side), torch.arange(8)
    backbone.train()
    with torch.no_grad():
        torch.manual_seed(0)
        first = addressed(backbone, x, positions)
        torch.manual_seed(1)
        second = addressed(backbone, x, positions)
        other = addressed(backbone, x, positions, step=4)
    return torch.equal(first, second) and not torch.equal(first, other)


def test_student_is_addressed() -> None:
    assert is_addressed(dropping(small_beit()))


def test_resized_model_is_still_addressed() -> None:
    backbone = resize(dropping(small_beit()), 64)
    assert is_addressed(backbone, 64)


def test_classifier_is_addressed() -> None:
    assert is_addressed(
        build_classifier(small_beit(), class_names=("a", "b"), drop_path=RATE),
    )


def test_generic_classifier_is_still_addressed() -> None:
    build = TimmBuild("edgenext_xx_small", {"num_classes": 0})
    body = build_fresh(build, spec="test", drop_path=RATE, image_size=64)
    stir(body.model)
    assert is_addressed(build_classifier(body, class_names=("a", "b"), drop_path=RATE), 64)
