"""`featdistill landscape`: loss and accuracy around models' weights, or between two models.

landscape.json, landscape.npz   the record; drawn by `report` at any time, finished or not
points/*.jsonl                  every point as it was found, one file a process
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.config.commands import LandscapeConfig
from featdistill.core.errors import ConfigError, Interrupted, ModelError
from featdistill.core.records import write_record
from featdistill.diagnostics.landscape import (
    Estimate,
    Point,
    Value,
    barrier,
    coordinates,
    line_between,
    low_area,
    ring,
    rise,
    stages,
)
from featdistill.diagnostics.subject import Subject
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.runtime import Runtime
from featdistill.engine.tracking import duration, say
from featdistill.evaluation.extraction import fingerprint
from featdistill.models.weights import tensors_hash
from featdistill.tasks.common import plain
from featdistill.tasks.diagnose import number
from featdistill.tasks.landscape_sweep import Place, Sweep, read_found
from featdistill.tasks.losses import (
    Gathered,
    images_record,
    loss_runtime,
    subject_record,
    subjects_of,
)

_RADIUS = 1.0
_REPEATS = {"plane": 1, "line": 10, "between": 1}
_LEVELS = {"classification": (0.1, 0.5, 1.0), "distillation": (0.01, 0.05, 0.1)}
# what changes no point, or only by rounding that the user asks for
_HARMLESS = frozenset(("run.devices", "run.threads", "memory", "names", "levels"))
_UNITS = {
    "plane": "steps along both directions, in norms of each filter's weights",
    "line": "steps along the direction, in norms of each filter's weights",
    "between": "0: the first model, 1: the second",
}


@dataclass(frozen=True)
class LandscapeResult:
    """What was found; NaN where a point is missing (only after an interruption).

    Attributes:
        steps: (K,) along an axis.
        losses: by model, (planes, K, K) with rows along the second direction, or (lines, K).
        accuracies: likewise, 0..1; of classifiers only.
        rises: by model and radius, mean rise of the loss; empty between models.
        record: landscape.json; its arrays lie in an npz beside it.
    """

    steps: np.ndarray
    losses: Mapping[str, np.ndarray]
    accuracies: Mapping[str, np.ndarray]
    rises: Mapping[str, Mapping[float, Estimate]]
    record: Path


@dataclass(frozen=True)
class _Frame:
    """What is measured where: the axis, and every point, coarse to fine."""

    steps: np.ndarray
    stages: list[list[Point]]
    repeats: int

    @classmethod
    def of(cls, config: LandscapeConfig) -> _Frame:
        if config.kind == "between":
            return cls(*line_between(config.grid), 1)
        steps = coordinates(config.grid, config.radius or _RADIUS)
        repeats = config.planes or _REPEATS[config.kind]
        return cls(steps, stages(steps, config.radii, config.kind), repeats)

    def places(self, models: int) -> list[list[Place]]:
        """By stage: all models are seen coarsely before any is seen finely."""
        return [
            [
                Place(model, plane, *point)
                for model in range(models)
                for plane in range(self.repeats)
                for point in stage
            ]
            for stage in self.stages
        ]


def run(config: LandscapeConfig) -> LandscapeResult:
    """Measure, and write the record."""
    check_out(config.run.out, resume=config.run.resume)
    _check_options(config)
    runtime = loss_runtime(config)
    gathered = subjects_of(config, runtime)
    if config.kind == "between":
        _check_alike(*gathered.subjects)
    frame = _Frame.of(config)
    sweep = Sweep(config.kind, gathered.subjects, seed=config.run.seed)
    folder = open_run(
        config.run.out,
        config,
        resume=config.run.resume,
        first=runtime.first,
        weights=_identity(gathered),
        may_change=_HARMLESS,
    )
    runtime.barrier()
    report = _Report(config, gathered, frame, sweep, folder)
    places = frame.places(1 if config.kind == "between" else len(gathered.subjects))
    report.begin(places, runtime)
    try:
        sweep.run(places, folder=folder, runtime=runtime, coarse=report.write)
    except Interrupted:
        report.write()
        raise
    runtime.barrier()
    result = report.write()
    report.end(result)
    return result


def _check_options(config: LandscapeConfig) -> None:
    if config.kind != "between":
        return
    problems = []
    if len(config.models) != 2:
        problems.append(
            f"landscape between wants two models, from one to the other; given "
            f"{len(config.models)} with --model"
        )
    problems += [
        f"--{name} is of no use between two models"
        for name, value in (("radius", config.radius), ("planes", config.planes))
        if value is not None
    ]
    if problems:
        raise ConfigError(problems)


def _check_alike(first: Subject, second: Subject) -> None:
    """Raise ModelError if one model's loss could not become the other's."""
    for name, value in first.facts.items():
        if value != second.facts[name]:
            raise ModelError(
                f"no line between '{first.name}' and '{second.name}': their {name} differs "
                f"({_cut(value)} and {_cut(second.facts[name])})",
                expected="two models of one architecture and one loss",
            )


def _cut(value: object, most: int = 60) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _identity(gathered: Gathered) -> dict[str, str]:
    """What a resumed run must find again."""
    found = {f"model {i + 1}": tensors_hash(s.module) for i, s in enumerate(gathered.subjects)}
    return {**found, "images": fingerprint(gathered.images)}


class _Report:
    """The record, and the lines for the person at the terminal."""

    def __init__(
        self,
        config: LandscapeConfig,
        gathered: Gathered,
        frame: _Frame,
        sweep: Sweep,
        folder: Path,
    ) -> None:
        self.config, self.gathered, self.frame, self.folder = config, gathered, frame, folder
        self.sweep = sweep
        self.first, self.total = True, 0
        self.about = [subject_record(s) for s in gathered.subjects]
        self.record = folder / "landscape.json"

    @property
    def between(self) -> bool:
        """Whether there is one line from the first model to the second."""
        return self.config.kind == "between"

    def begin(self, stages: list[list[Place]], runtime: Runtime) -> None:
        """Say what will be done."""
        self.first, self.total = runtime.first, sum(map(len, stages))
        subjects, images = self.gathered.subjects, self.gathered.images
        for i, subject in enumerate(subjects):
            say(f"{subject.name}: {subject.objective}; {self.sweep.describe(i)}")
        done = len(read_found(self.folder))
        say(
            f"{self.total:,} points, each the loss of {len(images):,} images of {images.name} "
            f"({runtime.describe()})" + (f"; {done:,} are done" if done else "")
        )

    def write(self) -> LandscapeResult:
        """Write the record of what is there by now; of several processes, the first does."""
        found = read_found(self.folder)
        losses, accuracies = self._arrays(found)
        count = 1 if self.between else len(self.about)
        classifies = self.gathered.subjects[0].kind == "classification"
        arrays: dict[str, np.ndarray] = {"coordinates": self.frame.steps}
        for i in range(count):
            arrays[f"{i}.loss"] = losses[i]
            if classifies:
                arrays[f"{i}.accuracy"] = accuracies[i]
        rises = {} if self.between else {i: self._rises(found, i) for i in range(count)}
        models = [
            {
                **about,
                **self.sweep.record(i),
                **self._scalars(i, losses, accuracies if classifies else None, rises.get(i)),
            }
            for i, about in enumerate(self.about)
        ]
        results: dict[str, Any] = {
            "kind": self.config.kind,
            "data": images_record(self.gathered.images, self.config),
            "objective": self.gathered.subjects[0].objective,
            "unit": _UNITS[self.config.kind],
            "points": {"done": len(found), "of": self.total},
            "models": models,
        }
        if self.between:
            results["barrier"] = number(barrier(self.frame.steps, losses[0][0]))
        if self.first:
            config = plain(self.config)
            write_record(self.record, "landscape", config=config, results=results, arrays=arrays)
        names = [s.name for s in self.gathered.subjects][:count]
        return LandscapeResult(
            self.frame.steps,
            dict(zip(names, losses, strict=True)),
            dict(zip(names, accuracies, strict=True)) if classifies else {},
            {names[i]: found for i, found in rises.items()},
            self.record,
        )

    def _arrays(self, found: Mapping[Place, Value]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of each model, losses and accuracies (planes, K, K) or (lines, K)."""
        steps = [float(s) for s in self.frame.steps]
        rows = steps if self.config.kind == "plane" else [0.0]
        count = 1 if self.between else len(self.about)
        shape = (count, self.frame.repeats, len(rows), len(steps))
        tables = np.full((2, *shape), np.nan)
        column, row = ({s: i for i, s in enumerate(axis)} for axis in (steps, rows))
        for place, value in found.items():
            if place.x in column and place.y in row:
                where = (place.model, place.plane, row[place.y], column[place.x])
                tables[(0, *where)] = value.loss
                tables[(1, *where)] = np.nan if value.accuracy is None else value.accuracy
        if self.config.kind != "plane":
            tables = tables[:, :, :, 0]
        return list(tables[0]), list(tables[1])

    def _rises(self, found: Mapping[Place, Value], model: int) -> dict[float, Estimate]:
        """By radius; those that are measured already."""
        assert self.config.kind != "between"
        values = {(p.plane, p.x, p.y): v.loss for p, v in found.items() if p.model == model}
        # every plane has the same middle
        centre = values.get((0, 0.0, 0.0), math.nan)
        rises = {}
        for radius in self.config.radii:
            rings = [
                [values.get((plane, *point), math.nan) for point in ring(radius, self.config.kind)]
                for plane in range(self.frame.repeats)
            ]
            if np.isnan(rings).any() or math.isnan(centre):
                continue
            rises[radius] = rise(np.array(rings), centre)
        return rises

    def _scalars(
        self,
        model: int,
        losses: list[np.ndarray],
        accuracies: list[np.ndarray] | None,
        rises: Mapping[float, Estimate] | None,
    ) -> dict[str, Any]:
        """The numbers of a model: at its own weights, and how flat it is around them."""
        steps = self.frame.steps
        middle = int(np.flatnonzero(steps == (model if self.between else 0))[0])
        table = losses[0 if self.between else model]
        at = (0, middle, middle) if self.config.kind == "plane" else (0, middle)
        found: dict[str, Any] = {"loss": number(table[at])}
        if accuracies is not None:
            found["accuracy"] = number(accuracies[0 if self.between else model][at])
        if rises is None:
            return found
        found["not_finite"] = int(np.isinf(table).sum())
        found["rise"] = [{"radius": r, **_estimate(e)} for r, e in rises.items()]
        if not np.isnan(table).any():
            kind = self.gathered.subjects[0].kind
            found["low_area"] = [
                {"rise": level, **_estimate(low_area(table, float(table[at]) + level))}
                for level in self.config.levels or _LEVELS[kind]
            ]
        return found

    def end(self, result: LandscapeResult) -> None:
        """The scalars as a table, and where the record is."""
        if self.between:
            self._end_between(result)
        else:
            self._end_around(result)
        say(f"done in {duration(self.sweep.seconds)}: {result.record}")
        say(f"next: featdistill report {self.config.run.out}")

    def _end_between(self, result: LandscapeResult) -> None:
        [losses] = result.losses.values()
        names = [s.name for s in self.gathered.subjects]
        for at, name in enumerate(names):
            say(f"loss {losses[0][result.steps == at][0]:.4f} at {name}")
        say(f"barrier between them: {barrier(result.steps, losses[0]):+.4f}")

    def _end_around(self, result: LandscapeResult) -> None:
        spread = "planes" if self.config.kind == "plane" else "lines"
        say(f"mean rise of the loss at a radius (+-: standard error over {spread}, if several)")
        for name, rises in result.rises.items():
            cells = [
                f"{radius:g}: {e.mean:.4g}" + ("" if e.error is None else f" +- {e.error:.2g}")
                for radius, e in rises.items()
            ]
            say(f"  {name}: {', '.join(cells)}")


def _estimate(found: Estimate) -> dict[str, float | None]:
    return {
        "mean": number(found.mean),
        "error": found.error,
        "lowest": number(found.lowest),
        "highest": number(found.highest),
    }
