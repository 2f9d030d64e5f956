"""Classification and SimCLR against their formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch, halves, student, tiny
from torch import Tensor

from featdistill.models.backbone import Backbone
from featdistill.objectives.classification import Classification
from featdistill.objectives.contrastive import SimCLR, nt_xent
from featdistill.objectives.mixing import erase, mix

K = 5
MIXING = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}


def classifier(**options: object) -> Backbone:
    return tiny("vit_tiny_patch16_224", num_classes=K, **options)


def test_classification_is_soft_cross_entropy() -> None:
    made = Classification(classifier(), **MIXING)
    data = batch(6, classes=K)
    images, soft = mix(
        data.images,
        data.labels,
        data.stream,
        classes=K,
        probability=1.0,
        switch=0.5,
        **MIXING,
    )
    assert not torch.equal(images, data.images)
    logits = made.classifier(images).logits.double()
    expected = -(soft.double() * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()
    loss = made(data)
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-6)
    hit = (logits.argmax(1) == soft.argmax(1)).float().mean()
    torch.testing.assert_close(loss.parts["train_top1"], hit)


def test_plain_classification_is_cross_entropy() -> None:
    made = Classification(classifier())
    data = batch(3, classes=K)
    expected = F.cross_entropy(made.classifier(data.images).logits, data.labels)
    torch.testing.assert_close(made(data).total, expected)
    assert not made.mixes


def test_smoothing_alone() -> None:
    made = Classification(classifier(), smoothing=0.1)
    data = batch(3, classes=K)
    expected = F.cross_entropy(
        made.classifier(data.images).logits, data.labels, label_smoothing=0.1
    )
    torch.testing.assert_close(made(data).total, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mixup": 0.8}, True),
        ({"cutmix": 1.0}, True),
        ({"mixup": 0.8, "mix_probability": 0.0}, False),
        ({"smoothing": 0.1}, False),
    ],
)
def test_mixes(options: dict[str, float], expected: bool) -> None:
    assert Classification(classifier(), **options).mixes is expected


def test_erasing_happens_in_normalised_space() -> None:
    made = Classification(classifier(), erasing=1.0)
    data = batch(2, classes=K)
    model = made.classifier
    inside = erase((data.images - model.mean) / model.std, data.stream, probability=1.0)
    logits = model.model(inside)
    torch.testing.assert_close(
        made(data).total, F.cross_entropy(logits, data.labels), rtol=1e-4, atol=1e-5
    )


def test_classification_gradients_do_not_see_micro_batches() -> None:
    made = Classification(classifier(drop_path=0.3), **MIXING, erasing=0.25).train()
    made(batch(8, classes=K)).total.backward()
    whole = {n: p.grad.clone() for n, p in made.named_parameters()}
    made.zero_grad()
    for part in halves(batch(8, classes=K), 4):
        (made(part).total / 4).backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=1e-6, msg=name)


# --- contrastive


def brute_nt_xent(a: Tensor, b: Tensor, temperature: float) -> tuple[float, float]:
    z = [v / v.norm() for v in torch.cat([a, b]).double()]
    n, losses, hits = len(a), [], []
    for i, anchor in enumerate(z):
        positive = (i + n) % (2 * n)
        scores = {j: float(anchor @ z[j]) / temperature for j in range(2 * n) if j != i}
        denominator = torch.tensor(list(scores.values()), dtype=torch.float64).logsumexp(0)
        losses.append(float(denominator) - scores[positive])
        hits.append(max(scores, key=scores.get) == positive)
    return sum(losses) / len(losses), sum(hits) / len(hits)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 7])
def test_nt_xent_is_brute_force(temperature: float, count: int) -> None:
    rng = torch.Generator().manual_seed(count)
    a = torch.randn(count, 4, generator=rng)
    b = a + 0.7 * torch.randn(count, 4, generator=rng)
    loss, hit = nt_xent(a, b, temperature)
    expected, agreement = brute_nt_xent(a, b, temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(hit) == pytest.approx(agreement)


def test_nt_xent_is_symmetric_and_does_not_see_lengths() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 4, generator=rng) for _ in range(2))
    torch.testing.assert_close(nt_xent(a, b, 0.2)[0], nt_xent(b, a, 0.2)[0])
    torch.testing.assert_close(nt_xent(3 * a, 0.1 * b, 0.2)[0], nt_xent(a, b, 0.2)[0])


@pytest.mark.parametrize("make", [student, lambda: tiny("swinv2_tiny_window8_256")])
def test_simclr_projects_cls_or_the_mean(make: object) -> None:
    made = SimCLR(make(), temperature=0.2, hidden=16, projection=8, seed=0)
    data = batch(4, views=2)
    z = []
    for view in data.views:
        features = made.backbone(view)
        vector = features.prefix[:, 0] if features.prefix_names else features.map.mean((2, 3))
        z.append(made.head(vector))
    expected, agreement = brute_nt_xent(*(v.detach() for v in z), 0.2)
    loss = made(data)
    assert float(loss.total) == pytest.approx(expected, rel=1e-4)
    assert float(loss.parts["agreement"]) == pytest.approx(agreement)
    loss.total.backward()
    assert all(p.grad is not None for p in made.head.parameters())


def test_simclr_drops_paths_of_the_two_views_apart() -> None:
    made = SimCLR(student(drop_path=0.5), temperature=0.2, hidden=16, projection=8, seed=0).train()
    data = batch(8, views=2)
    same = replace(data, views=(data.images, data.images))
    assert float(made(same).total) == float(made(same).total)
    made.backbone.eval()
    still = float(made(same).parts["agreement"])
    made.backbone.train()
    assert float(made(same).parts["agreement"]) < still == 1.0


def test_simclr_head_is_a_pure_function_of_the_seed() -> None:
    backbone = student()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (
        SimCLR(backbone, temperature=0.2, hidden=16, projection=8, seed=s).head[0].weight
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
