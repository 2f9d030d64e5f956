"""Logistic regression to its minimum, on features that do not change.

Dimensions: n images, C channels, K classes, G heads (one a weight decay).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from featdistill.evaluation.linear import Axes, Heads, Standardisation, parts

_ITERATIONS = 300
_GRADIENT, _CHANGE = 1e-5, 1e-7  # where a head is done, in coordinates of unit curvature
_CACHE_BYTES = 1 << 30


def solve_heads(
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    *,
    decays: Sequence[float],
    classes: int,
    device: torch.device | None = None,
    tick: Callable[[int, int], None] = lambda _done, _all: None,
) -> Heads:
    """The minimum of mean cross-entropy + decay / 2 |W|^2 on standardised features, for each decay.

    L-BFGS, as scikit-learn's `LogisticRegression(C=1 / (decay n))` and CLIP's linear probe, along
    the principal axes of the features, each stretched to unit curvature; from the largest decay to
    the smallest, each from the last one's minimum. Biases do not decay.

    Args:
        features: (n, C) float32, where they are.
        labels: (n,) int64.
        rows: places of the images to learn from.
        decays: above 0 (without a decay, classes that can be parted have no minimum).
        tick: called before each pass over the features, with a count and where it will end.

    Returns:
        Heads in the order of `decays`.
    """
    assert min(decays) > 0
    device = device or torch.device("cpu")
    standard = Standardisation.of(features, rows).to(device)
    axes = Axes.of(features, rows, standard)
    bank = _Bank(features, labels, rows, standard)
    shape = (features.shape[1], classes)
    weights, biases = torch.zeros(shape, device=device), torch.zeros(classes, device=device)
    found: dict[float, tuple[Tensor, Tensor]] = {}
    ordered = sorted(set(decays), reverse=True)
    for number, decay in enumerate(ordered):
        problem = _Problem(bank, axes, decay)
        start = number * _ITERATIONS

        def count(done: int, start: int = start) -> None:
            tick(start + min(done, _ITERATIONS - 1), len(ordered) * _ITERATIONS)

        weights, biases = problem.solve(weights, biases, count)
        found[decay] = weights, biases
    solved = [found[decay] for decay in decays]
    weight = axes.vectors @ torch.stack([w for w, _ in solved], dim=1).flatten(1)
    bias = torch.stack([b for _, b in solved])
    return Heads(weight.view(shape[0], len(decays), classes), bias, standard)


class _Bank:
    """Standardised features and labels in parts, on the device; kept there if they are few."""

    def __init__(
        self, features: Tensor, labels: Tensor, rows: Tensor, standard: Standardisation
    ) -> None:
        self._features, self._labels, self._rows = features, labels, rows
        self._standard, self._device = standard, standard.mean.device
        self.images = len(rows)
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        if len(rows) * features.shape[1] * features.element_size() <= self._room():
            self._kept = list(self._fresh())

    def _room(self) -> int:
        if self._device.type != "cuda":
            return _CACHE_BYTES
        return torch.cuda.mem_get_info(self._device)[0] // 2

    def _fresh(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in parts(self._features, self._labels, self._rows):
            yield self._standard(x.to(self._device)), y.to(self._device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._kept) if self._kept is not None else self._fresh()


class _Problem:
    """One decay's problem, in stretched axes: W = V D^-1/2 U for the unknowns U."""

    def __init__(self, bank: _Bank, axes: Axes, decay: float) -> None:
        self.bank, self.vectors, self.decay = bank, axes.vectors, decay
        self.stretch = (axes.variances / 4 + decay).rsqrt()[:, None]

    def solve(
        self, weight: Tensor, bias: Tensor, count: Callable[[int], None]
    ) -> tuple[Tensor, Tensor]:
        """The minimum, from a start; both (C, K) and (K,), in the axes."""
        unknown = (weight / self.stretch).requires_grad_()
        free = bias.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [unknown, free],
            max_iter=_ITERATIONS,
            tolerance_grad=_GRADIENT,
            tolerance_change=_CHANGE,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        done = 0

        def closure() -> float:
            nonlocal done
            count(done)
            done += 1
            value, unknown.grad, free.grad = self._value(unknown.detach(), free.detach())
            return value

        optimizer.step(closure)
        return unknown.detach() * self.stretch, free.detach()

    @torch.no_grad()
    def _value(self, unknown: Tensor, bias: Tensor) -> tuple[float, Tensor, Tensor]:
        """The loss and its gradients; written out, (p - y) x needs no graph."""
        inside = self.stretch * unknown
        weight = self.vectors @ inside
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        slope, slope_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for x, y in self.bank:
            log = torch.addmm(bias, x, weight).log_softmax(1)
            total -= log.gather(1, y[:, None]).double().sum()
            residual = log.exp_()
            residual[torch.arange(len(y), device=y.device), y] -= 1
            slope.addmm_(x.T, residual)
            slope_bias += residual.sum(0)
        n = self.bank.images
        gradient = self.vectors.T @ slope / n + self.decay * inside
        penalty = self.decay / 2 * inside.double().square().sum()
        return float(total / n + penalty), self.stretch * gradient, slope_bias / n
