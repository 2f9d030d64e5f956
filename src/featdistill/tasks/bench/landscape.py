"""`bench landscape`: its points beside evaluating the model as often, without moving it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from featdistill.config.commands import BenchConfig, LandscapeConfig
from featdistill.core.types import Batch
from featdistill.diagnostics.directions import direction, filters
from featdistill.diagnostics.landscape import coordinates, evaluate, stages
from featdistill.diagnostics.subject import Subject, classifier_subject
from featdistill.engine.journal import Journal
from featdistill.engine.runtime import pick_device
from featdistill.models.load import load_backbone
from featdistill.tasks.bench.common import IMAGES, ratio, seconds_of, set_up, table, take_turns
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
        points: of such a landscape.
        set_up: where and how it ran.
    """

    plain: float
    point: float
    directions: float
    whole: float
    points: int
    set_up: Mapping[str, Any]

    def lines(self) -> list[str]:
        at = self.set_up
        rows = [
            ("plain evaluation", "1.00", f"{self.plain:.3f} s"),
            ("point of a landscape", f"{self.point:.3f}", ""),
            ("directions", f"{self.directions:.2f} s", "once for each plane"),
            (
                "21x21 landscape",
                f"{self.whole:.3f}",
                f"of 441 evaluations, {self.points} points with its rings",
            ),
        ]
        head = (
            f"{at['model']}, {at['images']} images, {at['device']}, {at['rounds']} rounds in turn"
        )
        return [head, *table(rows)]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def run(config: BenchConfig) -> LandscapeCost:
    """Time points, by the command's own code, beside evaluations of the model as it stands."""
    device = torch.device(pick_device(config.device))
    subject = _subject(config, device)
    sweep = Sweep("plane", [subject], seed=0)
    evaluate(subject)  # warms up, and keeps the images
    drawing = seconds_of(lambda: _draw(subject), device)
    places = [(0, Place(0, 0, i / config.rounds, 1.0)) for i in range(config.rounds + 1)]
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(Path(folder) / "points.jsonl") as journal,
        closing(sweep.values(places)) as values,
    ):

        def point() -> None:
            _, place, value = next(values)
            journal.add([place, [value.loss, value.accuracy]])

        point()  # draws the directions
        works = {"point": point, "plain": lambda: evaluate(subject)}
        times = take_turns(works, rounds=config.rounds, device=device, warm=0)
    plain, found = times["plain"].median, ratio(times["point"], times["plain"])
    count = sum(map(len, stages(coordinates(21, 1.0), _radii(), "plane")))
    return LandscapeCost(
        plain=plain,
        point=found,
        directions=drawing,
        whole=(drawing / plain + count * found) / 21**2,
        points=count,
        set_up=set_up(
            device, model=config.model, images=config.batch_size or IMAGES, rounds=config.rounds
        ),
    )


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
    count = config.batch_size or IMAGES
    size = (count, 3, *backbone.image_size)
    order = torch.arange(count)
    images = torch.randint(0, 256, size, dtype=torch.uint8)
    labels = order % max(1, backbone.num_classes)
    batch = Batch((images,), labels, order, order)
    return classifier_subject(
        config.model, backbone, lambda: [batch], images=len(batch), budget=float("inf")
    )
