"""Linear classifiers on fixed features: a whole grid of settings trained at once.

Dimensions: n images, C channels, K classes, G heads (one a setting), B a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featdistill.core.errors import NonFiniteError
from featdistill.core.seeds import generator

_MOMENTUM = 0.9
_HEAD_ELEMENTS = 1 << 25  # heads train together while their weights and logits are no larger
_ROWS = 8192  # of the features, at a time
_NO_AXIS = 1e-6  # share of the largest variance below which an axis is rounding, or not there


@dataclass(frozen=True)
class Setting:
    """A point of the grid.

    Attributes:
        lr: peak learning rate; None where the minimum itself is found.
        weight_decay: lambda of lambda / 2 |W|^2, beside the mean loss; biases do not decay.
    """

    lr: float | None
    weight_decay: float


@dataclass(frozen=True)
class Trial:
    """A setting and what came of it on images that did not train it (top1 0..1, loss nats)."""

    setting: Setting
    top1: float
    loss: float


@dataclass(frozen=True)
class Standardisation:
    """x -> (x - mean) * scale, channel by channel.

    Each channel has mean 0 and variance 1 / C, so that a vector's squared length is 1 on average:
    learning rates and weight decays then mean the same for every model, whatever the size of its
    features and however many channels it has.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor, rows: Tensor) -> Standardisation:
        """That of some rows of (n, C) features; a channel that does not vary becomes 0."""
        count = len(rows)
        mean = sum(part.double().sum(0) for part in _parts(features, rows)) / count
        assert isinstance(mean, Tensor)
        var = sum((p.double() - mean).square().sum(0) for p in _parts(features, rows)) / count
        assert isinstance(var, Tensor)
        # below this a channel's variance is the rounding of its mean
        alive = var > 1e-12 * (var + mean.square())
        scale = torch.where(alive, (var * max(1, int(alive.sum()))).rsqrt(), 0.0)
        return cls(mean.float(), scale.float())

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale

    def to(self, device: torch.device) -> Standardisation:
        """The same on a device."""
        return Standardisation(self.mean.to(device), self.scale.to(device))


@dataclass(frozen=True)
class Linear:
    """One linear classifier of the features as they are: weight (K, C), bias (K,), float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(n, K) of (n, C)."""
        return torch.cat([part @ self.weight.T + self.bias for part in features.split(_ROWS)])


@dataclass(frozen=True)
class Heads:
    """Linear classifiers of standardised features: weight (C, G, K), bias (G, K)."""

    weight: Tensor
    bias: Tensor
    standard: Standardisation

    def logits(self, standardised: Tensor) -> Tensor:
        """(B, G, K) of (B, C)."""
        return torch.einsum("bc,cgk->bgk", standardised, self.weight) + self.bias

    def folded(self, head: int) -> Linear:
        """A head and the standardisation before it as one linear layer."""
        weight = self.weight[:, head].T.double().cpu() * self.standard.scale.double().cpu()
        bias = self.bias[head].double().cpu() - weight @ self.standard.mean.double().cpu()
        return Linear(weight.float(), bias.float())


def train_heads(
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    *,
    settings: Sequence[Setting],
    classes: int,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device | None = None,
    together: int | None = None,
    tick: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[Heads]:
    """Train a linear classifier for each setting, all on the same batches.

    Cross-entropy on standardised features, batches without end, Nesterov momentum 0.9, cosine to
    zero, from zero weights, as in DINOv2's linear evaluation (dinov2/eval/linear.py); besides,
    weight decay is in the grid, and rates are per axis (`_Trainer`).

    Args:
        features: (n, C) float32, where they are; batches travel to the device.
        labels: (n,) int64.
        rows: places of the images to learn from.
        steps: for each head.
        together: heads in one pass; by default as many as a fixed share of memory holds. It
            changes no head but for rounding.
        tick: called before each step with the steps done and all steps, of all passes.

    Returns:
        Heads in the order of the settings, in one or several parts.
    """
    device = device or torch.device("cpu")
    batch_size = min(batch_size, len(rows))
    standard = Standardisation.of(features, rows).to(device)
    axes = Axes.of(features, rows, standard)
    each = classes * max(features.shape[1], batch_size)
    together = together or max(1, _HEAD_ELEMENTS // each)
    total = -(-len(settings) // together) * steps
    found: list[Heads] = []
    for first in range(0, len(settings), together):
        part = settings[first : first + together]
        trainer = _Trainer(part, axes, classes)
        order = _order(rows, batch_size, seed)
        for step in range(steps):
            tick(len(found) * steps + step, total)
            mine = next(order)
            share = 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = standard(features[mine].to(device)) @ axes.vectors
            trainer.step(batch, labels[mine].to(device), share)
        weight = (axes.vectors @ trainer.weight.flatten(1)).view_as(trainer.weight)
        found.append(Heads(weight, trainer.bias, standard))
    return found


@dataclass(frozen=True)
class Axes:
    """Principal axes of standardised features: `vectors` (C, C), columns, and `variances` (C,)."""

    vectors: Tensor
    variances: Tensor

    @classmethod
    def of(cls, features: Tensor, rows: Tensor, standard: Standardisation) -> Axes:
        device = standard.mean.device
        outer = torch.zeros(len(standard.mean), len(standard.mean), dtype=torch.float64)
        for part in _parts(features, rows):
            x = standard(part.to(device))
            outer += (x.T @ x).double().cpu()
        variances, vectors = torch.linalg.eigh(outer / len(rows))
        return cls(vectors.float().to(device), variances.float().clamp_min(0).to(device))


class _Trainer:
    """Stochastic gradient descent over stacked heads, in the features' principal axes.

    Most axes vary a hundred or ten thousand times less than the first, and descent at one rate
    hardly reaches them in a thousand steps (docs/lab-notes.md): an axis's rate is the head's lr
    over the square root of its variance, of which the largest counts as 1, as in full-matrix
    AdaGrad. An axis without variance keeps its weight of zero, as at the minimum.

    The gradient of softmax and cross-entropy is written out, (p - y) x: it needs no graph.
    """

    def __init__(self, settings: Sequence[Setting], axes: Axes, classes: int) -> None:
        device, variances = axes.variances.device, axes.variances[:, None]
        lr = torch.tensor([s.lr for s in settings], device=device)
        shares = variances / variances.max().clamp_min(1e-30)
        rates = torch.where(shares > _NO_AXIS, lr * shares.clamp_min(_NO_AXIS).rsqrt(), 0.0)
        self._decays = torch.tensor([[s.weight_decay] for s in settings], device=device)
        self._rates = rates[:, :, None], lr[:, None]
        self.weight = torch.zeros(len(variances), len(settings), classes, device=device)
        self.bias = torch.zeros(len(settings), classes, device=device)
        self._momenta = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def step(self, x: Tensor, labels: Tensor, share: float) -> None:
        """One step on (B, C) features in the axes, at `share` of each head's peak rate."""
        shape = (len(x), *self.bias.shape)
        logits = torch.addmm(self.bias.flatten(), x, self.weight.flatten(1)).view(shape)
        residual = logits.softmax(2)
        residual[torch.arange(len(x), device=x.device), :, labels] -= 1
        residual /= len(x)
        slope = (x.T @ residual.flatten(1)).view_as(self.weight)
        slope.addcmul_(self._decays, self.weight)
        values, slopes = (self.weight, self.bias), (slope, residual.sum(0))
        for value, momentum, slope, rate in zip(
            values, self._momenta, slopes, self._rates, strict=True
        ):
            momentum.mul_(_MOMENTUM).add_(slope)
            value.addcmul_(rate, slope.add_(momentum, alpha=_MOMENTUM), value=-share)


def _order(rows: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches without end: pass after pass, each in an order of its own, none left out."""
    epoch, waiting = 0, rows[:0]
    while True:
        while len(waiting) < batch_size:
            turn = generator("probe", seed, epoch).permutation(len(rows))
            waiting = torch.cat([waiting, rows[torch.from_numpy(turn)]])
            epoch += 1
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


@torch.no_grad()
def try_heads(
    heads: Sequence[Heads], settings: Sequence[Setting], features: Tensor, labels: Tensor
) -> list[Trial]:
    """What each head makes of images that did not train it.

    Args:
        heads: from `train_heads`, in the order of `settings`.
        features: (n, C), `labels` (n,).
    """
    hits, losses = [], []
    for part in heads:
        device, n = part.weight.device, len(features)
        hit = torch.zeros(part.bias.shape[0], dtype=torch.float64, device=device)
        loss = torch.zeros_like(hit)
        rows = max(1, min(_ROWS, _HEAD_ELEMENTS // part.bias.numel()))
        for x, y in zip(features.split(rows), labels.split(rows), strict=True):
            logits, truth = part.logits(part.standard(x.to(device))), y.to(device)
            hit += (logits.argmax(2) == truth[:, None]).double().sum(0)
            wide = truth[:, None].expand(logits.shape[:2])
            each = F.cross_entropy(logits.transpose(1, 2), wide, reduction="none")
            loss += each.double().sum(0)
        hits += (hit / n).tolist()
        losses += (loss / n).tolist()
    return [Trial(*found) for found in zip(settings, hits, losses, strict=True)]


def choose(trials: Sequence[Trial], images: int) -> int:
    """The place of the best trial.

    That is the smallest loss among those whose accuracy is within one standard error of the best:
    on a few hundred images the highest accuracy alone is luck among many settings.

    Args:
        images: how many the accuracies are of.

    Raises:
        NonFiniteError: no setting came to a number.
    """
    alive = [i for i, trial in enumerate(trials) if math.isfinite(trial.loss)]
    if not alive:
        raise NonFiniteError(
            "no setting of the grid came to a finite loss", fix="look at the model's features"
        )
    best = max(trials[i].top1 for i in alive)
    error = math.sqrt(best * (1 - best) / images)
    level = [i for i in alive if trials[i].top1 >= best - error]
    return min(level, key=lambda i: trials[i].loss)


def edges(trials: Sequence[Trial], chosen: int) -> tuple[str, ...]:
    """Where a better setting may lie outside of the grid: `lr above`, `weight_decay below`, ...

    A setting on an edge counts if it is clearly better (by 1 % of the loss) than its neighbour
    inside; where the curve is flat, nothing is missed. Below a decay of 0 there is nothing.
    """
    found = []
    here = trials[chosen]
    for name in ("lr", "weight_decay"):
        values = sorted({getattr(trial.setting, name) for trial in trials} - {None})
        if len(values) < 2:
            continue
        place = values.index(getattr(here.setting, name))
        if 0 < place < len(values) - 1 or values[place] == 0:
            continue
        inside = values[1] if place == 0 else values[-2]
        other = "weight_decay" if name == "lr" else "lr"
        neighbour = next(
            trial
            for trial in trials
            if getattr(trial.setting, name) == inside
            and getattr(trial.setting, other) == getattr(here.setting, other)
        )
        if not neighbour.loss <= 1.01 * here.loss:
            found.append(f"{name} {'below' if place == 0 else 'above'}")
    return tuple(found)


def parts(features: Tensor, labels: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of features (n, C) and their labels (n,), a few thousand at a time."""
    for part in rows.split(_ROWS):
        yield features[part], labels[part]


def _parts(features: Tensor, rows: Tensor) -> Iterator[Tensor]:
    for part in rows.split(_ROWS):
        yield features[part]


def rows_of(images: np.ndarray, *, of: int, views: int = 1) -> Tensor:
    """The rows of some images among (views * of, C) features, whose views lie one after the other.

    Args:
        images: places among the `of` images.
    """
    places = torch.from_numpy(np.ascontiguousarray(images)).long()
    return torch.cat([places + view * of for view in range(views)])
