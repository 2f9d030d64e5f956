"""What a landscape costs beside evaluating the model as often, without moving its weights."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from featdistill.config.commands import BenchConfig, LandscapeConfig
from featdistill.core.types import Batch
from featdistill.diagnostics.directions import direction, filters
from featdistill.diagnostics.landscape import coordinates, evaluate, stages
from featdistill.diagnostics.subject import Subject, classifier_subject
from featdistill.engine.journal import Journal
from featdistill.engine.runtime import pick_device
from featdistill.engine.tracking import say
from featdistill.models.load import load_backbone
from featdistill.tasks.landscape_sweep import Place, Sweep


@dataclass(frozen=True)
class LandscapeCost:
    """Medians over rounds, in each of which a point and a plain evaluation took turns.

    Attributes:
        plain: seconds of an evaluation where the model is.
        point: a point of the landscape (moving there, evaluating, keeping the result) as a multiple
            of the evaluation after it.
        directions: seconds to draw and normalise a plane's directions, once for each plane.
        whole: a landscape of 21x21 points with its rings as a multiple of 441 evaluations.
    """

    plain: float
    point: float
    directions: float
    whole: float


def bench_landscape(config: BenchConfig) -> LandscapeCost:
    """Time points, by the command's own code, beside evaluations of the model as it stands."""
    device = torch.device(pick_device(config.device))
    subject = _subject(config, device)
    sweep = Sweep("plane", [subject], seed=0)
    evaluate(subject)  # warms up, and keeps the images
    drawing = _seconds(lambda: _draw(subject), device)
    places = [(0, Place(0, 0, i / config.rounds, 1.0)) for i in range(config.rounds + 1)]
    times = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(Path(folder) / "points.jsonl") as journal,
        closing(sweep.values(places)) as values,
    ):

        def point() -> None:
            _, place, value = next(values)
            journal.add([place, [value.loss, value.accuracy]])

        point()  # draws the directions
        for _ in range(config.rounds):
            times.append((_seconds(point, device), _seconds(lambda: evaluate(subject), device)))
    plain = statistics.median(p for _, p in times)
    ratio = statistics.median(a / b for a, b in times)
    count = sum(map(len, stages(coordinates(21, 1.0), _radii(), "plane")))
    whole = (drawing / plain + count * ratio) / 21**2
    say(
        f"{config.model}, {config.batch_size} images, {device}, {config.rounds} rounds in turn\n"
        f"plain evaluation     1.00 ({plain:.3f} s)\n"
        f"point of a landscape {ratio:.3f}\n"
        f"directions           {drawing:.2f} s, once for each plane\n"
        f"21x21 landscape      {whole:.3f} of 441 evaluations, {count} points with its rings"
    )
    return LandscapeCost(plain, ratio, drawing, whole)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _radii() -> tuple[float, ...]:
    default: tuple[float, ...] = LandscapeConfig.model_fields["radii"].default
    return default


def _draw(subject: Subject) -> None:
    weights = filters(subject.parts)
    for axis in (0, 1):
        direction(weights, seed=0, plane=0, axis=axis)


def _subject(config: BenchConfig, device: torch.device) -> Subject:
    backbone = load_backbone(config.model, weights="random", image_size=config.image_size)
    backbone.to(device).eval()
    size = (config.batch_size, 3, *backbone.image_size)
    order = torch.arange(config.batch_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8)
    labels = order % max(1, backbone.num_classes)
    batch = Batch((images,), labels, order, order)
    return classifier_subject(
        config.model, backbone, lambda: [batch], images=len(batch), budget=float("inf")
    )
