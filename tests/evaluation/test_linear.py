"""Linear heads on fixed features against scikit-learn, torch's own optimiser, and by hand."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from featdistill.core.errors import NonFiniteError
from featdistill.data.open import open_data
from featdistill.data.sources import Subset
from featdistill.evaluation.features import extract
from featdistill.evaluation.knn import knn
from featdistill.evaluation.linear import (
    Axes,
    Setting,
    Standardisation,
    Trial,
    choose,
    edges,
    rows_of,
    train_heads,
    try_heads,
)
from featdistill.evaluation.logistic import solve_heads
from featdistill.models.load import load_backbone

Bank = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Bank:
    """Pixels with their odd ends: an empty column, one that is constant, one of another size."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float(), torch.from_numpy(labels)
    x[:, 0], x[:, 1], x[:, 2] = 0.0, 0.3, x[:, 2] * 1e3 + 7e3
    return x[:600], y[:600], x[600:1200], y[600:1200]


def everything(x: Tensor) -> Tensor:
    return torch.arange(len(x))


# --- standardisation


def test_standardised_vectors_have_length_one_on_average(digits: Bank) -> None:
    x = digits[0]
    got = Standardisation.of(x, everything(x))(x)
    assert got.square().sum(1).mean() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(got.mean(0), torch.zeros(64), atol=1e-5, rtol=0)
    variances = got.var(0, unbiased=False)
    alive = variances > 0
    assert not alive[:2].any()
    torch.testing.assert_close(variances[alive], torch.full((int(alive.sum()),), 1 / alive.sum()))


def test_standardisation_is_of_the_given_rows(digits: Bank) -> None:
    x, some = digits[0], torch.tensor([5, 9, 400, 401])
    one, other = Standardisation.of(x, some), Standardisation.of(x[some], everything(x[some]))
    torch.testing.assert_close((one.mean, one.scale), (other.mean, other.scale))


def test_axes_are_those_of_the_covariance(digits: Bank) -> None:
    x = digits[0]
    standard = Standardisation.of(x, everything(x))
    axes = Axes.of(x, everything(x), standard)
    turned = (standard(x) @ axes.vectors).double()
    covariance = turned.T @ turned / len(x)
    torch.testing.assert_close(covariance, torch.diag(axes.variances.double()), atol=1e-6, rtol=0)
    assert axes.variances.sum() == pytest.approx(1, rel=1e-4)


# --- the minimum


def reference(x: np.ndarray, y: Tensor, decay: float) -> LogisticRegression:
    """scikit-learn's minimum of mean cross-entropy + decay / 2 |W|^2."""
    found = LogisticRegression(C=1 / (decay * len(x)), tol=1e-9, max_iter=5000)
    return found.fit(x, y.numpy())


@pytest.mark.parametrize("decay", [1e-6, 1e-4, 1e-2])
def test_the_minimum_is_scikit_learns(digits: Bank, decay: float) -> None:
    x, y, queries, _ = digits
    heads = solve_heads(x, y, everything(x), decays=[decay], classes=10)
    standard = heads.standard
    wanted = reference(standard(x).double().numpy(), y, decay)
    expected = wanted.predict_proba(standard(queries).double().numpy())
    got = heads.folded(0).logits(queries).softmax(1).double().numpy()
    assert (got.argmax(1) == expected.argmax(1)).mean() > 0.995
    assert np.abs(got - expected).mean() < 3e-3

    def value(weight: Tensor, bias: Tensor) -> float:
        logits = standard(x).double() @ weight + bias
        return float(F.cross_entropy(logits, y) + decay / 2 * weight.square().sum())

    coefficients, intercept = (torch.from_numpy(a) for a in (wanted.coef_.T, wanted.intercept_))
    mine = value(heads.weight[:, 0].double(), heads.bias[0].double())
    assert mine == pytest.approx(value(coefficients, intercept), rel=1e-2)


def test_decays_of_one_call_are_those_of_each(digits: Bank) -> None:
    x, y, queries, _ = digits
    together = solve_heads(x, y, everything(x), decays=[1e-5, 1e-3], classes=10)
    for g, decay in enumerate((1e-5, 1e-3)):
        alone = solve_heads(x, y, everything(x), decays=[decay], classes=10)
        got, wanted = (h.folded(i).logits(queries) for h, i in ((together, g), (alone, 0)))
        assert (got.softmax(1) - wanted.softmax(1)).abs().mean() < 2e-3


def test_scale_and_offset_of_the_features_do_not_matter(digits: Bank) -> None:
    x, y, queries, _ = digits
    size = torch.logspace(-3, 3, 64)
    one = solve_heads(x, y, everything(x), decays=[1e-4], classes=10).folded(0)
    other = solve_heads(x * size + size, y, everything(x), decays=[1e-4], classes=10).folded(0)
    got, wanted = other.logits(queries * size + size).softmax(1), one.logits(queries).softmax(1)
    assert (got - wanted).abs().max() < 0.02


def test_parts_that_are_not_kept_give_the_same(
    digits: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the features are larger than the memory: they are read anew in each pass."""
    x, y, queries, _ = digits
    whole = solve_heads(x, y, everything(x), decays=[1e-4], classes=10).folded(0)
    monkeypatch.setattr("featdistill.evaluation.logistic._CACHE_BYTES", 0)
    monkeypatch.setattr("featdistill.evaluation.linear._ROWS", 70)
    parts = solve_heads(x, y, everything(x), decays=[1e-4], classes=10).folded(0)
    assert (whole.logits(queries).softmax(1) - parts.logits(queries).softmax(1)).abs().max() < 0.01


# --- the grid of stochastic gradient descent

GRID = [Setting(lr, decay) for lr in (0.1, 1.0, 5.0) for decay in (0.0, 1e-3)]


def by_torch(digits: Bank, setting: Setting, *, steps: int, batch: int) -> Tensor:
    """Held-out logits of torch's own SGD on W' = W / sqrt(rate), with autograd, without chunks."""
    x, y, queries, _ = digits
    standard = Standardisation.of(x, everything(x))
    axes = Axes.of(x, everything(x), standard)
    shares = axes.variances / axes.variances.max()
    root = torch.where(shares > 1e-6, shares.clamp_min(1e-6) ** -0.25, 0.0)[:, None]
    weight, bias = torch.zeros(64, 10, requires_grad=True), torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9, nesterov=True)
    order = [
        torch.from_numpy(np.random.default_rng(0).permutation(len(x)))[:batch] for _ in range(steps)
    ]
    for step, mine in enumerate(order):
        optimizer.param_groups[0]["lr"] = setting.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        inside = root * weight
        logits = standard(x[mine]) @ axes.vectors @ inside + bias
        loss = F.cross_entropy(logits, y[mine])
        loss = loss + setting.weight_decay / 2 * inside.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return standard(queries) @ axes.vectors @ (root * weight) + bias


def test_each_head_is_torchs_own_descent(digits: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, queries, _ = digits
    fixed = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))[:64]
    monkeypatch.setattr(
        "featdistill.evaluation.linear._order", lambda *_: iter(lambda: fixed, None)
    )
    heads = train_heads(
        x,
        y,
        everything(x),
        settings=GRID,
        classes=10,
        steps=30,
        batch_size=64,
        seed=0,
        together=4,
    )
    assert [len(h.bias) for h in heads] == [4, 2]
    flat = [h.folded(g).logits(queries) for h in heads for g in range(len(h.bias))]
    for got, setting in zip(flat, GRID, strict=True):
        wanted = by_torch(digits, setting, steps=30, batch=64)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@given(together=st.integers(1, 6))
@settings(deadline=None, max_examples=6)
def test_heads_do_not_see_each_other(digits: Bank, together: int) -> None:
    x, y, queries, _ = digits
    options = {"classes": 10, "steps": 12, "batch_size": 50, "seed": 3, "settings": GRID}
    whole = train_heads(x, y, everything(x), **options)
    parts = train_heads(x, y, everything(x), **options, together=together)
    assert len(parts[0].bias) == together
    one, other = (
        torch.stack([h.folded(g).logits(queries) for h in hs for g in range(len(h.bias))])
        for hs in (whole, parts)
    )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_every_pass_sees_every_row_once(digits: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = digits[0], digits[1]
    rows, seen = torch.tensor([3, 5, 8, 13, 21, 34, 55]), []
    real = Standardisation.__call__

    def spy(self: Standardisation, part: Tensor) -> Tensor:
        seen.append(part)
        return real(self, part)

    monkeypatch.setattr(Standardisation, "__call__", spy)
    train_heads(x, y, rows, settings=GRID[:1], classes=10, steps=7, batch_size=3, seed=0)
    batches = torch.cat(seen[1:])  # the first is for the axes
    for turn in batches.split(7):
        order = [int((x == row).all(1).nonzero()[0]) for row in turn]
        assert sorted(order) == rows.tolist()
    assert not torch.equal(batches[:7], batches[7:14])


def test_trials_are_of_the_images_given(digits: Bank) -> None:
    x, y, queries, truth = digits
    heads = train_heads(
        x,
        y,
        everything(x),
        settings=GRID,
        classes=10,
        steps=40,
        batch_size=64,
        seed=0,
        together=5,
    )
    trials = try_heads(heads, GRID, queries, truth)
    flat = [h.folded(g).logits(queries) for h in heads for g in range(len(h.bias))]
    assert [t.setting for t in trials] == GRID
    for trial, logits in zip(trials, flat, strict=True):
        hit = float((logits.argmax(1) == truth).double().mean())
        assert trial.top1 == pytest.approx(hit, abs=0.004)
        assert trial.loss == pytest.approx(float(F.cross_entropy(logits, truth)), rel=1e-3)
    assert len({t.top1 for t in trials}) > 1


def test_rows_of_several_views() -> None:
    assert rows_of(np.array([0, 2]), of=5, views=3).tolist() == [0, 2, 5, 7, 10, 12]


# --- the choice


def trial(lr: float | None, decay: float, top1: float, loss: float) -> Trial:
    return Trial(Setting(lr, decay), top1, loss)


def test_within_a_standard_error_the_loss_chooses() -> None:
    """0.9 of 100 images has an error of 0.03."""
    trials = [trial(1, 0, 0.9, 0.5), trial(2, 0, 0.88, 0.4), trial(3, 0, 0.86, 0.1)]
    assert choose(trials, 100) == 1
    assert choose(trials, 100_000) == 0


def test_what_diverged_is_not_chosen() -> None:
    assert choose([trial(1, 0, 0.9, math.nan), trial(2, 0, 0.5, 1.0)], 10) == 1
    with pytest.raises(NonFiniteError, match="no setting"):
        choose([trial(1, 0, 0.9, math.inf)], 10)


def test_edges_of_the_grid() -> None:
    losses = {(1, 1e-3): 0.9, (2, 1e-3): 0.7, (1, 1e-2): 0.8, (2, 1e-2): 0.5}
    trials = [trial(lr, decay, 0.9, loss) for (lr, decay), loss in losses.items()]
    assert edges(trials, 3) == ("lr above", "weight_decay above")
    flat = [trial(lr, decay, 0.9, 0.5) for lr, decay in losses]
    assert edges(flat, 3) == (), "where the curve is flat, nothing is missed"


def test_below_no_decay_there_is_nothing() -> None:
    trials = [trial(None, decay, 0.9, 0.5 + decay) for decay in (0.0, 0.5, 1.0)]
    assert edges(trials, 0) == ()
    assert edges(trials[1:], 0) == ("weight_decay below",)
    assert edges(trials[:1], 0) == ()


# --- features of real photographs


@pytest.fixture(scope="module")
def cifar(real_data: Path) -> Bank:
    """Random convolutions' features of 3,000 + 1,000 images of CIFAR-10."""
    data = open_data(str(real_data / "cifar10"))
    backbone = load_backbone("timm/resnet18", weights="random", image_size=32)
    found: list[Tensor] = []
    draw = np.random.default_rng(0)
    for part, count in ((data.train, 3000), (data.held_out, 1000)):
        assert part is not None
        some = Subset(part, np.sort(draw.permutation(len(part))[:count]))
        found.append(extract(backbone, some, how="mean", batch_size=250, crop=1.0, workers=0))
        found.append(torch.from_numpy(some.labels))
    return found[0], found[1], found[2], found[3]


def test_the_minimum_on_cifar_is_scikit_learns(cifar: Bank) -> None:
    x, y, queries, truth = cifar
    decays = [1e-5, 1e-4, 1e-3]
    heads = solve_heads(x, y, everything(x), decays=decays, classes=10)
    for g, decay in enumerate(decays):
        a, b = (heads.standard(v).double().numpy() for v in (x, queries))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may stop at its limit of iterations
            wanted = LogisticRegression(C=1 / (decay * len(a)), tol=1e-5, max_iter=500)
            expected = wanted.fit(a, y.numpy()).predict(b)
        got = heads.folded(g).logits(queries).argmax(1)
        top1, theirs = (float((p == truth.numpy()).mean()) for p in (got.numpy(), expected))
        assert abs(top1 - theirs) < 0.01
        assert top1 > 0.2


@pytest.mark.parametrize("k", [1, 10, 100])
def test_knn_on_cifar_is_scikit_learns(cifar: Bank, k: int) -> None:
    x, y, queries, truth = cifar
    # some images of CIFAR-10 occur twice, under two labels: who is nearer is anybody's guess
    first = torch.from_numpy(np.sort(np.unique(x.numpy(), axis=0, return_index=True)[1]))
    x, y = x[first], y[first]
    reference = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    ).fit(x.double().numpy(), y.numpy())
    predicted = torch.from_numpy(reference.predict(queries.double().numpy()))
    got = knn(x, y, queries, truth, ks=[k])
    assert torch.equal(got.correct[k], predicted == truth)
