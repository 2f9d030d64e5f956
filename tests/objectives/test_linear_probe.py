"""The online probe: torch's batch norm and cross-entropy over a backbone that nothing reaches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from tiny_models import tiny
from torch import Tensor, nn

from featdistill.core.types import Batch
from featdistill.models.backbone import Backbone, Origin
from featdistill.models.pooling import vector_of
from featdistill.objectives.probing import BatchStandardisation, LinearProbe


def vit() -> Backbone:
    return tiny("vit_tiny_patch16_224")


def resnet() -> Backbone:
    """With running statistics, which a forward pass in training mode would move."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(8, 8, 16, 24))
    return Backbone(
        model,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=(32, 32),
        origin=Origin("resnet", "random"),
        fixed_size=False,
    )


def batch(images: int = 6) -> Batch:
    rng = torch.Generator().manual_seed(0)
    views = torch.rand(images, 3, 32, 32, generator=rng)
    return Batch((views,), torch.arange(images) % 3, torch.arange(images), torch.arange(images))


def probe(backbone: Backbone, **options: object) -> LinearProbe:
    return LinearProbe(
        backbone, vector_of(backbone, "mean"), channels=backbone.width, classes=3, **options
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [vit, resnet])
def test_nothing_reaches_the_backbone(make: Callable[[], Backbone], training: bool) -> None:
    backbone = make().train(training)
    frozen = next(m for m in backbone.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d))
    frozen.eval()  # a part with a mode of its own
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    modes = [m.training for m in backbone.modules()]
    objective = probe(backbone)
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    for _ in range(3):
        objective(batch()).total.backward()
        optimizer.step()
    after = backbone.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [m.training for m in backbone.modules()] == modes
    assert all(p.grad is None for p in backbone.parameters())
    assert not any("backbone" in name for name in objective.state_dict())
    assert objective.head.weight.grad is not None


def test_loss_and_gradient_are_torchs_own() -> None:
    backbone = vit()
    objective = probe(backbone).train()
    norm, head = nn.BatchNorm1d(backbone.width, eps=1e-6, affine=False), nn.Linear(24, 3)
    head.load_state_dict(objective.head.state_dict())
    data = batch()
    with torch.no_grad():
        features = backbone(data.images).map.mean((2, 3))
    expected = F.cross_entropy(head(norm(features)), data.labels)
    got = objective(data)
    got.total.backward()
    expected.backward()
    torch.testing.assert_close(got.total, expected)
    torch.testing.assert_close(objective.head.weight.grad, head.weight.grad, rtol=1e-4, atol=1e-5)
    assert isinstance(objective.norm, BatchStandardisation)
    torch.testing.assert_close(objective.norm.mean, norm.running_mean)
    torch.testing.assert_close(objective.norm.var, norm.running_var)
    objective.eval(), norm.eval()
    torch.testing.assert_close(objective.logits(data.images), head(norm(features)))


@torch.no_grad()
def test_two_processes_norm_by_the_whole_batch() -> None:
    """Each sees half; the sum over both is made by hand, part by part."""
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
    halves = x[:5], x[5:]
    sums: list[list[Tensor]] = [[], []]

    def first(i: int) -> BatchStandardisation:
        norm = BatchStandardisation(4, total=lambda v: sums[i].append(v) or v)
        norm(halves[i])
        return norm

    for i in (0, 1):
        first(i)
    counted = sums[0][0] + sums[1][0]
    middle = counted[1] / counted[0]
    squares = sum((h.double() - middle).square().sum(0) for h in halves)

    def shared(i: int) -> BatchStandardisation:
        answers = iter([counted, squares])
        return BatchStandardisation(4, total=lambda _: next(answers)).train()

    norms = [shared(0), shared(1)]
    got = torch.cat([norm(h) for norm, h in zip(norms, halves, strict=True)])
    whole = nn.BatchNorm1d(4, eps=1e-6, affine=False)
    torch.testing.assert_close(got, whole(x))
    assert torch.equal(norms[0].var, norms[1].var)
    torch.testing.assert_close(norms[0].var, whole.running_var)


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
def test_folded_is_norm_and_head(norm: bool) -> None:
    backbone = vit()
    objective = probe(backbone, norm=norm).train()
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        objective(replace(batch(), views=(torch.rand(6, 3, 32, 32, generator=draw),)))
    objective.eval()
    weight, bias = objective.folded()
    images = batch().images
    wanted = objective.logits(images)
    torch.testing.assert_close(objective.vectors(images) @ weight.T + bias, wanted)


def test_the_seed_draws_the_head() -> None:
    backbone = vit()
    one, same, other = (probe(backbone, seed=s).head.weight for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float(one.detach().std()) == pytest.approx(0.01, rel=0.3)
