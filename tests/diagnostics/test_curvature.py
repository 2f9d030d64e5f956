"""Hessians against dense ones, closed forms, and any batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from curvlinops import HessianLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from featdistill.core.errors import ModelError, NonFiniteError, RunError
from featdistill.diagnostics.curvature import Curvature, HessianOperator, Search, curvature

IMAGES = 12


class Mlp(nn.Module):
    """Nothing in it troubles forward-mode derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Pairs:
    """Inputs and labels in batches, the same each time."""

    def __init__(self, x: Tensor, y: Tensor, size: int = IMAGES) -> None:
        self.x, self.y, self.size = x, y, size

    def __iter__(self) -> Iterator[Any]:
        for i in range(0, len(self.x), self.size):
            yield Pair(self.x[i : i + self.size], self.y[i : i + self.size])


class Pair:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)


def cross_entropies(model: nn.Module) -> Callable[[Pair], Tensor]:
    return lambda pair: F.cross_entropy(model(pair.x), pair.y, reduction="none")


def operator(model: nn.Module, pairs: Pairs) -> HessianOperator:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return HessianOperator(parameters, cross_entropies(model), pairs, images=len(pairs.x))


def mlp(dtype: torch.dtype = torch.float32, size: int = IMAGES) -> tuple[nn.Module, Pairs]:
    torch.manual_seed(0)
    x, y = torch.randn(IMAGES, 6, dtype=dtype), torch.randint(3, (IMAGES,))
    return Mlp().to(dtype), Pairs(x, y, size)


def vit(size: int = IMAGES) -> tuple[nn.Module, Pairs]:
    """With attention, layer norms and GELU; its norms' weights are far from 1."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2,
        mlp_ratio=1, num_classes=3,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, y = torch.randn(IMAGES, 3, 8, 8), torch.randint(3, (IMAGES,))
    return model.eval().double(), Pairs(x.double(), y, size)


def dense(model: nn.Module, pairs: Pairs) -> Tensor:
    """By torch.func.hessian, of the whole batch at once."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    shapes = [model.get_parameter(n).shape for n in names]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        given = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, given, (pairs.x,)), pairs.y)

    flat = torch.cat([model.get_parameter(n).detach().flatten() for n in names])
    return torch.func.hessian(loss)(flat)


def by_differences(model: nn.Module, pairs: Pairs, direction: list[Tensor]) -> list[Tensor]:
    """A product by central differences of the gradient: no second derivative is taken."""
    step = 1e-5

    def gradient(sign: int) -> tuple[Tensor, ...]:
        moved = {
            name: (p.detach() + sign * step * d).requires_grad_()
            for (name, p), d in zip(model.named_parameters(), direction, strict=True)
        }
        logits = torch.func.functional_call(model, moved, (pairs.x,))
        return torch.autograd.grad(F.cross_entropy(logits, pairs.y), list(moved.values()))

    return [(a - b) / (2 * step) for a, b in zip(gradient(1), gradient(-1), strict=True)]


def relative(found: list[Tensor], want: list[Tensor]) -> float:
    a, b = (torch.cat([t.flatten() for t in part]) for part in (found, want))
    return float((a - b).norm() / b.norm())


# the product


def test_products_are_the_dense_hessians() -> None:
    model, pairs = mlp(torch.float64)
    whole, eye = dense(model, pairs), torch.eye(83, dtype=torch.float64)
    torch.testing.assert_close(operator(model, pairs) @ eye, whole, rtol=1e-10, atol=1e-12)


def test_a_transformers_products_are_differences_of_gradients() -> None:
    model, pairs = vit(size=5)
    direction = [torch.randn_like(p) for p in model.parameters()]
    found = operator(model, pairs) @ direction
    assert relative(found, by_differences(model, pairs, direction)) < 1e-7


def test_curvlinops_own_operator_is_wrong_for_layer_norms() -> None:
    """Why the product is ours. If this fails, torch has mended jvp of jacrev: take theirs."""
    model, pairs = vit()

    class Loss(nn.Module):
        reduction = "mean"

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels)

    parameters = list(model.parameters())
    theirs = HessianLinearOperator(
        model, Loss(), parameters, [(pairs.x, pairs.y)], check_deterministic=False
    )
    direction = [torch.randn_like(p) for p in parameters]
    want = by_differences(model, pairs, direction)
    with sdpa_kernel(SDPBackend.MATH):
        found = theirs @ direction
    wrong = {
        name
        for (name, _), a, b in zip(model.named_parameters(), found, want, strict=True)
        if (a - b).norm() > 1e-4 * b.norm()
    }
    assert wrong == {"blocks.0.norm1.weight", "blocks.0.norm2.weight", "norm.weight"}


def test_theirs_and_ours_agree_without_layer_norm() -> None:
    model, pairs = mlp(torch.float64)

    class Loss(nn.Module):
        reduction = "mean"

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels)

    theirs = HessianLinearOperator(
        model, Loss(), list(model.parameters()), [(pairs.x, pairs.y)], check_deterministic=False
    )
    vectors = torch.randn(83, 2, dtype=torch.float64)
    torch.testing.assert_close(operator(model, pairs) @ vectors, theirs @ vectors)


def test_frozen_parameters_are_not_moved() -> None:
    model, pairs = mlp(torch.float64)
    model.layers[0].requires_grad_(False)  # type: ignore[index, operator, union-attr]
    hessian = operator(model, pairs)
    assert hessian.shape == (27, 27)
    eye = torch.eye(27, dtype=torch.float64)
    torch.testing.assert_close(hessian @ eye, dense(model, pairs), rtol=1e-10, atol=1e-12)


# eigenvalues and trace


def test_top_eigenvalues_of_a_small_network() -> None:
    for dtype in (torch.float32, torch.float64):
        model, pairs = mlp(dtype)
        found = curvature(operator(model, pairs), Search(count=5, probes=0, tolerance=1e-5))
        want = torch.linalg.eigvalsh(dense(model, pairs)).flip(0)[:5].numpy()
        np.testing.assert_allclose(found.eigenvalues, want, rtol=1e-4)
        assert found.settled
        assert (found.residuals < 1e-4 * want[0]).all()
        assert found.trace is None


def test_top_eigenvalues_of_a_transformer() -> None:
    """Dense by double backward: torch.func.hessian has the layer norms wrong."""
    model, pairs = vit()
    hessian = operator(model, pairs)
    n = hessian.shape[0]
    whole = hessian @ torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(whole, whole.T, rtol=1e-8, atol=1e-10)
    values = torch.linalg.eigvalsh(whole).flip(0)
    found = curvature(hessian, Search(count=4, probes=30, tolerance=1e-6))
    np.testing.assert_allclose(found.eigenvalues, values[:4].numpy(), rtol=1e-4)
    assert found.trace is not None
    assert found.trace_error is not None
    assert abs(found.trace - float(values.sum())) < 4 * found.trace_error
    assert found.deviation < 1e-3


def test_residuals_are_those_of_the_eigenvectors() -> None:
    """A loose tolerance leaves residuals, and an eigenvalue is within each of them."""
    model, pairs = vit()
    hessian = operator(model, pairs)
    whole = hessian @ torch.eye(hessian.shape[0], dtype=torch.float64)
    values = torch.linalg.eigvalsh(whole).numpy()
    found = curvature(hessian, Search(count=3, probes=0, tolerance=0.3))
    assert found.residuals.max() > 1e-6
    for value, residual in zip(found.eigenvalues, found.residuals, strict=True):
        assert np.abs(values - value).min() <= residual * (1 + 1e-9)


class Quadratic(nn.Module):
    """Loss theta' A theta / 2 of any A: eigenvalues and trace are A's."""

    def __init__(self, eigenvalues: np.ndarray) -> None:
        super().__init__()
        n = len(eigenvalues)
        turn = torch.linalg.qr(
            torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ).Q
        self.matrix = turn @ torch.diag(torch.from_numpy(eigenvalues)) @ turn.T
        self.theta = nn.Parameter(torch.ones(n, dtype=torch.float64))

    def operator(self) -> HessianOperator:
        loss = lambda pair: (0.5 * self.theta @ self.matrix @ self.theta).expand(len(pair))  # noqa: E731
        pairs = Pairs(torch.zeros(4), torch.zeros(4), 2)
        return HessianOperator([self.theta], loss, pairs, images=4)


@pytest.fixture
def spectrum() -> np.ndarray:
    return np.concatenate([[90.0, 40, 10], np.linspace(-2, 1, 57)])


def test_a_quadratic_loss(spectrum: np.ndarray) -> None:
    found = curvature(Quadratic(spectrum).operator(), Search(count=3, probes=2, tolerance=1e-8))
    np.testing.assert_allclose(found.eigenvalues, [90, 40, 10], rtol=1e-8)


def test_the_trace_is_unbiased_and_knows_its_error(spectrum: np.ndarray) -> None:
    """Over seeds: the mean is right, and the claimed error is the spread."""
    hessian = Quadratic(spectrum).operator()
    results = [
        curvature(hessian, Search(count=3, probes=8, tolerance=0.05, seed=s)) for s in range(40)
    ]
    traces = np.array([r.trace for r in results], float)
    errors = np.array([r.trace_error for r in results], float)
    spread = traces.std(ddof=1)
    assert abs(traces.mean() - spectrum.sum()) < 4 * spread / np.sqrt(40)
    assert 0.7 < np.sqrt((errors**2).mean()) / spread < 1.4
    # without the known part the largest eigenvalues would be noise: 2 |A - diag A|_F^2 / m
    matrix = Quadratic(spectrum).matrix
    plain = float((2 * (matrix - torch.diag(matrix.diag())).square().sum() / 8).sqrt())
    assert spread < 0.5 * plain


def numbers(found: Curvature) -> list[float]:
    assert found.trace is not None
    assert found.trace_error is not None
    return [*found.eigenvalues, found.trace, found.trace_error]


def test_the_batch_size_changes_nothing_and_neither_do_processes() -> None:
    search = Search(count=3, probes=5, tolerance=1e-8)
    model, pairs = vit()
    whole = curvature(operator(model, pairs), search)
    for size in (1, 5):
        again = curvature(operator(model, Pairs(pairs.x, pairs.y, size)), search)
        np.testing.assert_allclose(numbers(again), numbers(whole), rtol=1e-8)
    shares = [Pairs(pairs.x[rank::2], pairs.y[rank::2], 4) for rank in range(2)]
    parameters, losses = list(model.parameters()), cross_entropies(model)
    other = HessianOperator(parameters, losses, shares[1], images=IMAGES)
    vectors = torch.randn(sum(p.numel() for p in parameters), 2, dtype=torch.float64)
    theirs = (other @ vectors).split([p.numel() for p in parameters])
    waiting = [t.view(*p.shape, 2) for t, p in zip(theirs, parameters, strict=True)]
    both = HessianOperator(
        parameters, losses, shares[0], images=IMAGES, total=lambda part: part + waiting.pop(0)
    )
    torch.testing.assert_close(both @ vectors, operator(model, pairs) @ vectors)


def test_each_product_is_counted() -> None:
    model, pairs = mlp()
    told: list[tuple[str, int]] = []
    search = Search(count=2, probes=3)
    found = curvature(operator(model, pairs), search, each=lambda *what: told.append(what))
    assert [done for _, done in told] == list(range(1, found.products + 1))
    assert [phase for phase, _ in told][-5:] == ["residuals"] * 2 + ["trace"] * 3
    assert found.products <= search.most(83)


@pytest.mark.parametrize("budget", [25, 60, 200])
def test_the_budget_is_kept(budget: int) -> None:
    """A tolerance that is never met: what converges is told, the rest is said to be missing."""
    crowded = Quadratic(np.linspace(-1, 1, 400))
    search = Search(count=4, probes=2, tolerance=1e-14, products=budget)
    told: list[str] = []
    each = lambda phase, _done: told.append(phase)  # noqa: E731
    with pytest.raises(RunError, match=r"no eigenvalue converged within .* give more --products"):
        curvature(crowded.operator(), search, each=each)
    assert 20 <= len(told) <= search.most(400) - 6
    assert search.most(400) <= max(budget, 20 + 17) + 6


def test_what_did_not_converge_is_said() -> None:
    """Two eigenvalues stand apart; the rest are crowded."""
    hessian = Quadratic(np.concatenate([[50.0, 20], np.linspace(-1, 1, 398)])).operator()
    found = curvature(hessian, Search(count=6, probes=2, tolerance=1e-10, products=60))
    np.testing.assert_allclose(found.eigenvalues[:2], [50, 20])
    assert 2 <= len(found.eigenvalues) < 6
    assert not found.settled


# wrong use


class Opaque(torch.autograd.Function):
    """The square, with a gradient that torch takes for a constant, as fused kernels' is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def squares(function: Callable[[Tensor], Tensor]) -> HessianOperator:
    theta = nn.Parameter(torch.linspace(1, 2, 30))
    loss = lambda pair: (function(theta[:15]).sum() + (theta**3).sum()).expand(len(pair))  # noqa: E731
    return HessianOperator([theta], loss, Pairs(torch.zeros(2), torch.zeros(2)), images=2)


def test_a_missing_second_derivative_is_noticed() -> None:
    search = Search(count=2, probes=0)
    assert curvature(squares(torch.square), search).deviation < 1e-2
    assert curvature(squares(Opaque.apply), search).deviation < 1e-2  # not where it is largest
    theta = nn.Parameter(torch.linspace(1, 2, 30))
    loss = lambda pair: (20 * Opaque.apply(theta) + theta**3).sum().expand(len(pair))  # noqa: E731
    hessian = HessianOperator([theta], loss, Pairs(torch.zeros(2), torch.zeros(2)), images=2)
    before = theta.detach().clone()
    assert curvature(hessian, search).deviation == pytest.approx(40 / 12, rel=0.05)
    assert torch.equal(theta, before)


def test_no_second_derivative_at_all() -> None:
    theta = nn.Parameter(torch.ones(30))
    hessian = HessianOperator(
        [theta],
        lambda pair: (Opaque.apply(theta) ** 2).sum().expand(len(pair)),
        Pairs(torch.zeros(2), torch.zeros(2)),
        images=2,
    )
    with pytest.raises(ModelError, match="every product with the Hessian is zero"):
        curvature(hessian, Search(count=2))


def test_weights_that_are_no_numbers() -> None:
    model, pairs = mlp()
    model.layers[0].weight.data.fill_(torch.nan)  # type: ignore[index, union-attr]
    with pytest.raises(NonFiniteError, match="look at the model's weights"):
        curvature(operator(model, pairs), Search(count=2))


def test_a_loss_without_curvature() -> None:
    theta = nn.Parameter(torch.ones(30))
    hessian = HessianOperator(
        [theta], lambda pair: theta.sum().expand(2), Pairs(torch.zeros(2), torch.zeros(2)), images=2
    )
    assert not (hessian @ torch.randn(30)).any()
