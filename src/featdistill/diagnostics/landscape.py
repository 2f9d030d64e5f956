"""Loss and accuracy over a plane or a line through a model's weights, and how flat they are.

Dimensions: K steps along an axis, P planes (or lines), Q radii.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch

from featdistill.diagnostics.subject import Subject

ShapeName = Literal["plane", "line"]
Point: TypeAlias = tuple[float, float]  # steps along both directions; along a line (step, 0)

_HALF = math.sqrt(0.5)
# The circle's mean by the trapezoid rule: exact for every polynomial of the two steps up to
# degree 7. Exact numbers on the axes, where a circle meets points of the grid.
_COMPASS: tuple[Point, ...] = (
    (1.0, 0.0),
    (_HALF, _HALF),
    (0.0, 1.0),
    (-_HALF, _HALF),
    (-1.0, 0.0),
    (-_HALF, -_HALF),
    (0.0, -1.0),
    (_HALF, -_HALF),
)
_BOTH: tuple[Point, ...] = ((1.0, 0.0), (-1.0, 0.0))


@dataclass(frozen=True)
class Value:
    """At one point: the mean loss over the images, and the share of them that is named right.

    A loss that is no number counts as infinite: it is above every level.
    """

    loss: float
    accuracy: float | None = None


@torch.inference_mode()
def evaluate(subject: Subject) -> Value:
    """The subject as it stands, summed in float64, so that batches change it by rounding alone."""
    device = subject.backbone.mean.device
    classifies = subject.kind == "classification"
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    count = 0
    for piece in subject.pieces:
        outputs = subject.module(piece.images)
        sums[0] += subject.losses_of(outputs, piece.answers).double().sum()
        if classifies:
            sums[1] += (outputs.argmax(1) == piece.answers).sum()
        count += len(piece)
    loss, hits = (sums / count).tolist()
    return Value(loss if math.isfinite(loss) else math.inf, hits if classifies else None)


def coordinates(count: int, radius: float) -> np.ndarray:
    """(K,) steps from -radius to radius; the middle one is exactly 0."""
    assert count % 2, count
    half = count // 2
    return radius * ((np.arange(count) - half) / half)


def strides(count: int) -> list[int]:
    """Coarse to fine: 21 points are seen as 3, 5, 11 and 21 (every 10th, 5th, 2nd, each)."""
    found, stride = [], count // 2
    while stride:
        found.append(stride)
        stride //= 2
    return found


def ring(radius: float, shape: ShapeName) -> tuple[Point, ...]:
    """Where the rise at a radius is measured: 8 points of a circle, or both sides of a line."""
    around = _COMPASS if shape == "plane" else _BOTH
    return tuple((radius * x, radius * y) for x, y in around)


def stages(steps: np.ndarray, radii: Sequence[float], shape: ShapeName) -> list[list[Point]]:
    """Every point once: the centre, the coarsest grid, the rings, and ever finer grids."""
    count, half = len(steps), len(steps) // 2
    found: list[list[Point]] = [[(0.0, 0.0)]]
    for stride in strides(count):
        xs = [float(steps[i]) for i in range(half % stride, count, stride)]
        ys = xs if shape == "plane" else [0.0]
        found.append([(x, y) for y in ys for x in xs])
        if stride == half:
            found.append([point for radius in radii for point in ring(radius, shape)])
    return each_once(found)


def each_once(stages: Iterable[Iterable[Point]]) -> list[list[Point]]:
    """The stages without what an earlier one has; empty ones go."""
    seen: set[Point] = set()
    found = []
    for stage in stages:
        new = [point for point in dict.fromkeys(stage) if point not in seen]
        seen.update(new)
        if new:
            found.append(new)
    return found


def line_between(count: int) -> tuple[np.ndarray, list[list[Point]]]:
    """(K,) places from half before the first model (0) to half behind the second (1), and stages.

    Args:
        count: 4 n + 1, so that both models are among them.
    """
    assert count % 4 == 1, count
    steps = np.arange(count) * 2 / (count - 1) - 0.5
    places = [[steps[i] for i in range(count // 2 % s, count, s)] for s in strides(count)]
    return steps, each_once([[(float(x), 0.0) for x in xs] for xs in ([0.0, 1.0], *places)])


def barrier(steps: np.ndarray, losses: np.ndarray) -> float:
    """How far the loss between two models rises above the line between theirs; 0 if never.

    Source: Frankle et al. 2020 (their error barrier), of the loss.

    Args:
        steps, losses: (K,); the models are at 0 and 1.
    """
    ends = losses[steps == 0][0], losses[steps == 1][0]
    between = (steps >= 0) & (steps <= 1)
    straight = (1 - steps[between]) * ends[0] + steps[between] * ends[1]
    return float((losses[between] - straight).max())


@dataclass(frozen=True)
class Estimate:
    """A mean over planes or lines, with its standard error (None of a single one).

    Attributes:
        lowest, highest: over every point that it was measured at.
    """

    mean: float
    error: float | None
    lowest: float
    highest: float


def _estimate(each: np.ndarray, points: np.ndarray) -> Estimate:
    count = len(each)
    error = None
    if count > 1 and np.isfinite(each).all():
        error = float(each.std(ddof=1) / math.sqrt(count))
    return Estimate(float(each.mean()), error, float(points.min()), float(points.max()))


def rise(rings: np.ndarray, centre: float) -> Estimate:
    """How much the loss rises on average at a radius, in its own unit.

    Args:
        rings: (P, n) losses at the points of `ring`.
    """
    above = rings - centre
    return _estimate(above.mean(1), above)


def low_share(plane: np.ndarray, level: float) -> float:
    """Share of a plane's square (K, K), or of a line (K,), whose loss is below a level; 0..1.

    Lines: linear between steps. Planes: each cell is four triangles that meet in its middle (at the
    mean of its corners), linear in each; exact for linear functions.
    """
    values = np.minimum(np.asarray(plane, float), level + 1e9)  # infinite ones have no slope
    if values.ndim == 1:
        low, high = np.minimum(values[:-1], values[1:]), np.maximum(values[:-1], values[1:])
        return float(_below_segment(low, high, level).mean())
    a, b, c, d = values[:-1, :-1], values[:-1, 1:], values[1:, 1:], values[1:, :-1]
    middle = (a + b + c + d) / 4
    sides = [np.stack([p, q, middle]) for p, q in ((a, b), (b, c), (c, d), (d, a))]
    return float(np.mean([_below_triangle(np.sort(side, axis=0), level).mean() for side in sides]))


def _below_segment(low: np.ndarray, high: np.ndarray, level: float) -> np.ndarray:
    wide = np.where(high > low, high - low, 1.0)
    return np.where(high > low, np.clip((level - low) / wide, 0, 1), low < level)


def _below_triangle(corners: np.ndarray, level: float) -> np.ndarray:
    """Share of triangles below a level; corners (3, ...) in ascending order."""
    a, b, c = corners
    near = (b - a) * (c - a)
    far = (c - a) * (c - b)
    first = (level - a) ** 2 / np.where(near > 0, near, 1.0)
    second = 1 - (c - level) ** 2 / np.where(far > 0, far, 1.0)
    found = np.where(level <= b, first, second)
    return np.where(level <= a, 0.0, np.where(level >= c, 1.0, found))


def low_area(planes: np.ndarray, level: float) -> Estimate:
    """`low_share` over planes (P, K, K) or lines (P, K)."""
    each = np.array([low_share(plane, level) for plane in planes])
    return _estimate(each, each)
