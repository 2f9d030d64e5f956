"""kNN, classifier scores and feature extraction against brute force."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import mean
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featdistill.core.errors import ModelError
from featdistill.core.types import Features
from featdistill.data.loader import Share
from featdistill.data.sources import ArraySource
from featdistill.data.views import EvalView
from featdistill.evaluation.classification import (
    Scores,
    accuracy_by_class,
    calibration_error,
    score,
)
from featdistill.evaluation.features import extract
from featdistill.evaluation.knn import knn
from featdistill.models.backbone import Backbone, Origin, TimmBuild
from featdistill.models.pooling import pool
from featdistill.models.students import build_fresh

K = 7


# --- kNN


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float(), torch.from_numpy(labels)
    return x[:1200], y[:1200], x[1200:], y[1200:]


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_knn_is_scikit_learns(
    digits: tuple[Tensor, Tensor, Tensor, Tensor], k: int, temperature: float
) -> None:
    bank, labels, queries, truth = digits
    reference = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    ).fit(bank.double().numpy(), labels.numpy())
    predicted = torch.from_numpy(reference.predict(queries.double().numpy()))
    got = knn(bank, labels, queries, truth, ks=[k], temperature=temperature)
    assert torch.equal(got.correct[k], predicted == truth)
    assert got.top1[k] == pytest.approx(float((predicted == truth).double().mean()), abs=0)


@given(chunk=st.integers(20, 700), block=st.integers(40, 1300))
@settings(deadline=None, max_examples=10)
def test_knn_does_not_see_chunk_and_block(
    digits: tuple[Tensor, Tensor, Tensor, Tensor], chunk: int, block: int
) -> None:
    whole = knn(*digits, ks=[1, 10])
    parts = knn(*digits, ks=[1, 10], chunk=chunk, block=block)
    assert all(torch.equal(parts.correct[k], whole.correct[k]) for k in (1, 10))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *made])
        return out


def test_knn_never_holds_all_pairs() -> None:
    rng = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 4, generator=rng) for n in (3000, 700))
    labels, truth = torch.arange(3000) % 7, torch.arange(700) % 7
    with Largest() as largest:
        got = knn(bank, labels, queries, truth, ks=[1, 20], chunk=50, block=400)
    assert largest.elements == 50 * 400
    whole = knn(bank, labels, queries, truth, ks=[1, 20], chunk=700, block=3000)
    assert all(torch.equal(got.correct[k], whole.correct[k]) for k in (1, 20))


def test_knn_of_several_k_is_that_of_each(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    together = knn(*digits, ks=[20, 1, 5])
    assert list(together.top1) == [1, 5, 20]
    for k in (1, 5, 20):
        assert torch.equal(together.correct[k], knn(*digits, ks=[k]).correct[k])


def test_k_larger_than_the_bank() -> None:
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    queries, truth = torch.eye(3)[[2, 0]], torch.tensor([2, 1])
    got = knn(bank, labels, queries, truth, ks=[1, 50])
    assert got.top1 == {1: 0.5}
    assert got.correct[1].tolist() == [True, False]
    assert list(knn(bank, labels, queries, truth, ks=[50]).top1) == [3]


def test_low_temperature_does_not_overflow() -> None:
    rng = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(30, 4, generator=rng) for _ in range(2))
    labels = torch.arange(30) % 3
    cold = knn(bank, labels, queries, labels, ks=[10], temperature=1e-3)
    nearest = knn(bank, labels, queries, labels, ks=[1])
    assert torch.equal(cold.correct[10], nearest.correct[1])


def test_knn_does_not_see_lengths(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    bank, labels, queries, truth = digits
    scale = torch.linspace(0.5, 4, len(queries))[:, None]
    one, other = (knn(bank, labels, q, truth, ks=[5]) for q in (queries, queries * scale))
    assert one.top1[5] == pytest.approx(other.top1[5], abs=0.005)


def test_class_that_only_the_queries_have() -> None:
    got = knn(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 5]), ks=[1])
    assert got.correct[1].tolist() == [True, False]


# --- scores


def source(count: int, classes: int = K, side: int = 40) -> ArraySource:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), generator=rng, dtype=torch.uint8)
    labels = torch.randint(classes, (count,), generator=rng).numpy()
    return ArraySource("noise", images, labels, tuple("abcdefg"[:classes]))


@torch.no_grad()
def of_every_rank(classifier: Backbone, count: int, crop: float) -> ArraySource:
    """Noise whose labels are the model's best, second best, ... guesses in turn."""
    images = source(count)
    order = classifier(views(images, crop)).logits.argsort(1, descending=True)
    labels = order[torch.arange(count), torch.arange(count) % K]
    return replace(images, labels=labels.numpy())


@pytest.fixture(scope="session")
def classifier() -> Backbone:
    return vit(num_classes=K)


def vit(**arguments: object) -> Backbone:
    size = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
    build = TimmBuild("vit_tiny_patch16_224", {"num_classes": 0, **size, **arguments})
    backbone = build_fresh(build, spec="vit").eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return backbone


def views(images: ArraySource, crop: float = 0.875) -> Tensor:
    """What the model sees, one image at a time."""
    view = EvalView(32, crop)
    return torch.stack([view(images.read(i))[0] for i in range(len(images))]).float() / 255


@torch.no_grad()
def brute(classifier: Backbone, images: ArraySource, crop: float) -> dict[str, object]:
    logits = torch.cat([classifier(x[None]).logits for x in views(images, crop)]).double()
    hits, fives, losses = [], [], []
    classes: dict[int, list[bool]] = {}
    bins: dict[int, list[tuple[bool, float]]] = {}
    for row, label in zip(logits, images.labels.tolist(), strict=True):
        rank = int((row > row[label]).sum())
        hits.append(rank == 0)
        classes.setdefault(label, []).append(rank == 0)
        sure = float(row.exp().max() / row.exp().sum())
        number = next(b for b in range(15) if b / 15 < sure <= (b + 1) / 15)
        bins.setdefault(number, []).append((rank == 0, sure))
        fives.append(rank < 5)
        losses.append(math.log(float(row.exp().sum())) - float(row[label]))
    return {
        "top1": sum(hits) / len(hits),
        "top5": sum(fives) / len(fives),
        "loss": sum(losses) / len(losses),
        "predictions": logits.argmax(1),
        "by_class": {c: sum(found) / len(found) for c, found in classes.items()},
        "calibration": sum(
            len(rows) / len(hits) * abs(mean(h for h, _ in rows) - mean(c for _, c in rows))
            for rows in bins.values()
        ),
    }


@pytest.mark.parametrize("crop", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 64])
def test_scores_are_brute_force(classifier: Backbone, batch_size: int, crop: float) -> None:
    images = of_every_rank(classifier, 23, crop)
    got = score(classifier, images, batch_size=batch_size, crop=crop, workers=0)
    expected = brute(classifier, images, crop)
    assert (expected["top1"], expected["top5"]) == (4 / 23, 17 / 23)
    assert got.top1 == pytest.approx(expected["top1"])
    assert got.top5 == pytest.approx(expected["top5"])
    assert got.loss == pytest.approx(expected["loss"], rel=1e-5)
    assert torch.equal(got.predictions, expected["predictions"])
    assert np.array_equal(got.labels.numpy(), images.labels)
    assert got.calibration_error == pytest.approx(expected["calibration"], rel=1e-5)
    accuracies = {c: a for c, a in enumerate(got.by_class.tolist()) if not math.isnan(a)}
    assert accuracies == pytest.approx(expected["by_class"])
    assert got.mean_by_class == pytest.approx(mean(expected["by_class"].values()))


@pytest.mark.parametrize("count", [23, 24])
def test_two_processes_give_the_scores_of_one(classifier: Backbone, count: int) -> None:
    images = of_every_rank(classifier, count, 0.875)
    tables: dict[int, Tensor] = {}
    both = Barrier(2)
    options = {"batch_size": 5, "workers": 0}

    def process(rank: int) -> Scores:
        def gather(table: Tensor) -> Tensor:
            tables[rank] = table
            both.wait(60)
            return torch.cat([tables[0], tables[1]])

        return score(classifier, images, share=Share(rank, 2), gather=gather, **options)

    with ThreadPoolExecutor(2) as pool:
        got, other = pool.map(process, (0, 1))
    assert len(tables[0]) + len(tables[1]) == count
    assert torch.equal(got.predictions, other.predictions)
    alone = score(classifier, images, **options)
    assert got.calibration_error == pytest.approx(alone.calibration_error, rel=1e-6)
    assert torch.equal(got.by_class.nan_to_num(-1), alone.by_class.nan_to_num(-1))
    assert (got.top1, got.top5) == (alone.top1, alone.top5)
    assert got.loss == pytest.approx(alone.loss, rel=1e-6)
    assert torch.equal(got.predictions, alone.predictions)
    assert torch.equal(got.labels, alone.labels)


def test_more_processes_than_images(classifier: Backbone) -> None:
    images = source(1)
    alone = score(classifier, images, batch_size=4, workers=0)

    def everyone(table: Tensor) -> Tensor:
        assert table.shape == (0, 6)
        row = [0.0, alone.labels[0], alone.predictions[0], alone.top5, alone.loss, 0.5]
        return torch.cat([torch.tensor([row], dtype=torch.float64), table])

    got = score(classifier, images, batch_size=4, workers=0, share=Share(1, 2), gather=everyone)
    assert torch.equal(got.predictions, alone.predictions)


def test_calibration_by_hand() -> None:
    """Bins (0.6, 0.667] and (0.933, 1]: 3/4 |1/3 - 0.62| + 1/4 |1 - 1|; an edge belongs below."""
    sure = torch.tensor([0.61, 0.62, 0.63, 1.0])
    right = torch.tensor([True, False, False, True])
    assert calibration_error(sure, right) == pytest.approx(0.75 * (0.62 - 1 / 3))
    edge = torch.tensor([0.5, 0.6])
    apart = calibration_error(edge, torch.tensor([True, False]), bins=2)
    assert apart == pytest.approx((0.5 + 0.6) / 2), "two bins, so the errors do not cancel"
    assert calibration_error(edge, torch.tensor([True, False]), bins=1) == pytest.approx(0.05)


def test_accuracy_by_class_by_hand() -> None:
    got = accuracy_by_class(torch.tensor([0, 1, 1, 3]), torch.tensor([0, 0, 1, 1]), 4)
    assert got[:2].tolist() == [0.5, 0.5]
    assert got[2:].isnan().all()


def test_fewer_than_five_classes() -> None:
    got = score(vit(num_classes=3), source(9, classes=3), batch_size=4, workers=0)
    assert got.top5 == 1.0


# --- features


class Batched(nn.Module):
    """A model with running statistics, which a forward pass in training mode would move."""

    num_classes = 0
    feature_info = None

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 8, 8)
        self.norm = nn.BatchNorm2d(6)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.amax((2, 3))


@pytest.fixture
def batched() -> Backbone:
    torch.manual_seed(0)
    return Backbone(
        Batched(),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=(32, 32),
        origin=Origin("batched", "random"),
    )


@torch.no_grad()
@pytest.mark.parametrize("how", ["mean", "cls", "model"])
def test_extract_is_one_image_at_a_time(how: str) -> None:
    backbone, images = vit(), source(11)
    got = extract(backbone, images, how=how, batch_size=4, workers=0)
    for row, x in zip(got, views(images), strict=True):
        features = backbone(x[None])
        wanted = {
            "mean": features.map[0].flatten(1).mean(1),
            "cls": features.prefix[0, 0],
            "model": features.pooled[0],
        }[how]
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)
    assert got.dtype == torch.float32
    assert not got.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_extract_leaves_weights_buffers_and_mode(batched: Backbone, training: bool) -> None:
    batched.train(training)
    before = {k: v.clone() for k, v in batched.state_dict().items()}
    first = extract(batched, source(6), how="mean", batch_size=4, workers=0)
    after = batched.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(first, extract(batched, source(6), how="mean", batch_size=4, workers=0))
    assert batched.training is training
    assert batched.model.training is training


def test_extract_evaluates(batched: Backbone) -> None:
    batched.train()
    images = source(6)
    whole = extract(batched, images, how="model", batch_size=6, workers=0)
    single = extract(batched, images, how="model", batch_size=1, workers=0)
    torch.testing.assert_close(whole, single)


def test_pool_of_cls_needs_one() -> None:
    map_ = torch.rand(2, 4, 3, 3)
    features = Features(map_, map_.new_empty(2, 0, 4), (), map_.amax((2, 3)))
    with pytest.raises(ModelError, match=r"no CLS token.*--pool mean"):
        pool(features, "cls")
    torch.testing.assert_close(pool(features, "mean"), map_.mean((2, 3)))


def test_pool_finds_cls_by_name() -> None:
    prefix = torch.arange(2 * 2 * 4.0).reshape(2, 2, 4)
    map_ = torch.rand(2, 4, 3, 3)
    features = Features(map_, prefix, ("reg1", "cls"), map_.mean((2, 3)))
    assert torch.equal(pool(features, "cls"), prefix[:, 1])
