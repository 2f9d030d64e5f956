"""The landscape: closed forms of points, orientation, rises and areas."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from featdistill.core.types import Batch
from featdistill.diagnostics.directions import Plane, filters
from featdistill.diagnostics.landscape import (
    barrier,
    coordinates,
    evaluate,
    line_between,
    low_area,
    low_share,
    ring,
    rise,
    stages,
    strides,
)
from featdistill.diagnostics.subject import Kept, Piece, Subject, classifier_subject
from featdistill.models.load import load_backbone


def test_the_grid_has_the_model_in_its_middle() -> None:
    steps = coordinates(21, 1.0)
    assert (steps[0], steps[10], steps[20]) == (-1.0, 0.0, 1.0)
    assert np.array_equal(steps, -steps[::-1])
    assert 0.5 in steps
    assert strides(21) == [10, 5, 2, 1]
    assert strides(3) == [1]


@pytest.mark.parametrize("count", [3, 5, 7, 21, 23])
@pytest.mark.parametrize("shape", ["plane", "line"])
def test_coarse_to_fine_finds_every_point_once(count: int, shape: Any) -> None:
    steps = coordinates(count, 0.7)
    found = stages(steps, (0.25,), shape)
    points = [p for stage in found for p in stage]
    assert found[0] == [(0.0, 0.0)]
    assert len(set(points)) == len(points)
    grid = {(x, y) for x in steps for y in (steps if shape == "plane" else [0.0])}
    assert set(points) == grid | set(ring(0.25, shape))
    sides = {abs(c) for p in found[1] for c in p}
    assert sides == {0.0, 0.7}  # the coarsest grid: the corners and the middles of the sides


def test_of_21_points_the_rings_add_16() -> None:
    """3.6 %: a circle's points on the axes are the grid's at radius 0.5 and 1."""
    found = stages(coordinates(21, 1.0), (0.25, 0.5, 1.0), "plane")
    assert sum(map(len, found)) == 441 + 16


def quadratic(x: float, y: float) -> float:
    return 2.0 + 3 * x * x + 0.5 * y * y


class Bowl(nn.Module):
    """Its output is a quadratic of one weight matrix: 2 + 3 w0^2 + w1^2 / 2 around its start."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        nn.init.constant_(self.layer.weight, 1.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        w = self.layer.weight[0].double() - 1
        value = 2 + 3 * w[0] ** 2 + 0.5 * w[1] ** 2
        return value.expand(len(images))


def bowl() -> tuple[Subject, Plane]:
    """A subject, and the plane of its two weights: one step is one unit of a weight."""
    module = Bowl()
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    subject = Subject.__new__(Subject)
    subject.kind, subject.module = "distillation", module.eval()
    subject.backbone = SimpleNamespace(mean=torch.zeros(1))  # type: ignore[assignment]
    subject.losses_of = lambda outputs, _: outputs
    subject.pieces = Kept(lambda: [Piece(images, torch.zeros(3))], images=3, budget=1e9)
    plane = Plane(
        filters([("", module)]), [torch.tensor([[1.0, 0.0]])], [torch.tensor([[0.0, 1.0]])]
    )
    return subject, plane


def table_of(steps: np.ndarray) -> np.ndarray:
    subject, plane = bowl()
    with plane:
        rows = []
        for y in steps:
            row = []
            for x in steps:
                plane.go(float(x), float(y))
                row.append(evaluate(subject).loss)
            rows.append(row)
    return np.array(rows)


def test_a_quadratic_is_exact_symmetric_and_aligned() -> None:
    """Steps that float32 holds exactly: then every point is, and rows lie along the second one."""
    steps = coordinates(9, 1.0)
    table = table_of(steps)
    assert table[4, 4] == 2.0 == table.min()
    want = np.array([[quadratic(x, y) for x in steps] for y in steps])
    assert np.array_equal(table, want)
    assert np.array_equal(table, table[::-1, ::-1])
    # steep along the first direction, which runs along a row
    assert table[4, -1] == 5.0
    assert table[-1, 4] == 2.5


def test_the_rise_of_a_quadratic_is_its_mean_curvature() -> None:
    """Mean over a circle of a x^2 + b y^2 is (a + b) r^2 / 2, also from 8 points of it."""
    for radius in (0.25, 0.5, 1.0):
        rings = np.array([[quadratic(*p) for p in ring(radius, "plane")]] * 2)
        found = rise(rings, 2.0)
        assert found.mean == pytest.approx(3.5 * radius**2 / 2, rel=1e-12)
        assert found.error == 0.0
        assert found.highest == pytest.approx(3 * radius**2)
        assert found.lowest == pytest.approx(0.5 * radius**2)


def test_eight_points_are_a_circles_mean_up_to_degree_seven() -> None:
    angles = np.linspace(0, 2 * math.pi, 4096, endpoint=False)
    for a in range(8):
        for b in range(8 - a):
            want = np.mean(np.cos(angles) ** a * np.sin(angles) ** b)
            got = np.mean([x**a * y**b for x, y in ring(1.0, "plane")])
            assert got == pytest.approx(want, abs=1e-12), (a, b)


def test_the_error_of_a_rise_is_over_planes() -> None:
    found = rise(np.array([[1.0, 3.0], [5.0, 7.0], [3.0, 5.0]]), 1.0)
    assert found.mean == 3.0  # of 1, 5, 3
    assert found.error == pytest.approx(2 / math.sqrt(3))
    assert (found.lowest, found.highest) == (0.0, 6.0)
    assert rise(np.array([[1.0, 3.0]]), 1.0).error is None
    assert rise(np.array([[1.0, math.inf]]), 1.0).mean == math.inf


@pytest.mark.parametrize("level", [-2.0, -1.0, -0.3, 0.0, 0.25, 1.0, 2.5])
def test_areas_of_linear_functions_are_exact(level: float) -> None:
    steps = coordinates(7, 1.0)
    x, y = np.meshgrid(steps, steps)
    share = min(max((level + 1) / 2, 0), 1)
    assert low_share(x, level) == pytest.approx(share, abs=1e-12)
    assert low_share(steps, level) == pytest.approx(share, abs=1e-12)
    # x + y < level: a triangle cut off a corner of the square of area 4
    cut = max(level + 2, 0) ** 2 / 8 if level <= 0 else 1 - max(2 - level, 0) ** 2 / 8
    assert low_share(x + y, level) == pytest.approx(cut, abs=1e-12)


def test_the_area_of_a_bowl_is_nearly_that_of_its_ellipse() -> None:
    steps = coordinates(41, 1.0)
    x, y = np.meshgrid(steps, steps)
    found = low_area(np.stack([quadratic(x, y), 2 * quadratic(x, y) - 2]), 2.3)  # type: ignore[arg-type]
    semi = [math.sqrt(0.3 / 3), math.sqrt(0.3 / 0.5)]
    areas = [math.pi * semi[0] * semi[1] / 4 / k for k in (1, 2)]
    assert found.mean == pytest.approx(np.mean(areas), rel=0.01)
    assert found.error == pytest.approx(abs(areas[0] - areas[1]) / 2, rel=0.05)


def test_what_is_infinite_is_above_every_level() -> None:
    plane = np.array([[0.0, 0, 0], [0, 0, 0], [0, 0, math.inf]])
    share = low_share(plane, 1.0)
    assert 0.75 < share < 0.96
    assert low_share(np.full((3, 3), math.inf), 1.0) == 0
    assert low_share(np.zeros((3, 3)), 1.0) == 1


def test_between_has_both_models() -> None:
    steps, found = line_between(21)
    assert (steps[0], steps[5], steps[15], steps[20]) == (-0.5, 0.0, 1.0, 1.5)
    assert found[0] == [(0.0, 0.0), (1.0, 0.0)]
    assert sorted(p for stage in found for p in stage) == [(s, 0.0) for s in steps]


def test_the_barrier_is_what_stands_out_of_the_straight_line() -> None:
    steps, _ = line_between(21)
    straight = 1 + 2 * steps
    assert barrier(steps, straight) == pytest.approx(0, abs=1e-12)
    assert barrier(steps, straight + 4 * steps * (1 - steps)) == pytest.approx(1)
    assert barrier(steps, straight - 4 * steps * (1 - steps)) == pytest.approx(0, abs=1e-12)


def small(batch_size: int, budget: float = 1e9) -> tuple[Subject, list[int]]:
    """A tiny classifier on 10 images of noise, and how often they were read."""
    torch.manual_seed(0)
    backbone = load_backbone("timm/resnet10t", weights="random", image_size=32)
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (10, 3, 32, 32), generator=draw, dtype=torch.uint8)
    reads: list[int] = []

    def batches() -> list[Batch]:
        reads.append(1)
        order = torch.arange(10)
        cuts = [slice(i, i + batch_size) for i in range(0, 10, batch_size)]
        return [Batch((images[c],), order[c] * 7, order[c], order[c]) for c in cuts]

    return classifier_subject("small", backbone, batches, images=10, budget=budget), reads


def test_the_loss_is_the_mean_over_images_whatever_the_batch() -> None:
    whole, _ = small(10)
    with torch.no_grad():
        piece = next(iter(whole.pieces))
        logits = whole.backbone(piece.images.float() / 255).logits
        want = nn.functional.cross_entropy(logits, piece.answers)
        right = (logits.argmax(1) == piece.answers).double().mean()
    for batch_size in (10, 4, 1):
        found = evaluate(small(batch_size)[0])
        assert found.loss == pytest.approx(float(want), rel=1e-5)
        assert found.accuracy == float(right)


def test_images_are_read_once_if_they_fit() -> None:
    fits, reads = small(4)
    losses = {evaluate(fits).loss for _ in range(3)}
    assert (len(losses), len(reads), fits.pieces.in_memory) == (1, 1, True)
    large, reads = small(4, budget=10 * 3 * 32 * 32 - 1)
    assert {evaluate(large).loss for _ in range(3)} == losses
    assert (len(reads), large.pieces.in_memory) == (3, False)


def test_kept_pieces_serve_a_backward_pass() -> None:
    subject, _ = small(5)
    evaluate(subject)
    sum(subject.losses(piece).mean() for piece in subject.pieces).backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in subject.parameters.values()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert not any("running" in name for name in subject.parameters)


def test_running_statistics_do_not_move_and_are_not_updated() -> None:
    subject, _ = small(5)
    before = {k: v.clone() for k, v in subject.backbone.state_dict().items()}
    weights = filters(subject.parts)
    with Plane(weights, [w.parameter.detach().clone() for w in weights.values()]) as line:
        line.go(0.5)
        evaluate(subject)
        for name, buffer in subject.backbone.named_buffers():
            assert name not in before or torch.equal(buffer, before[name])
    assert all(torch.equal(v, before[k]) for k, v in subject.backbone.state_dict().items())


def test_a_loss_that_is_no_number_is_infinite() -> None:
    subject, _ = small(5)
    with torch.no_grad():
        subject.backbone.model.fc.weight.fill_(float("nan"))
    assert evaluate(subject).loss == math.inf
