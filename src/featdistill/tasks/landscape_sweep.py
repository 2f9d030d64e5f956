"""The points of a landscape, one by one: dealt among processes, kept as soon as they are found."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from featdistill.core.errors import Interrupted
from featdistill.diagnostics.directions import Between, Plane, direction, filters
from featdistill.diagnostics.landscape import Value, evaluate
from featdistill.diagnostics.subject import Subject
from featdistill.engine.journal import Journal, read_journal
from featdistill.engine.runtime import Runtime
from featdistill.engine.signals import StopRequest, stop_on_signals
from featdistill.engine.tracking import Bar, duration

_PARTIAL_SECONDS = 10.0  # between records of an unfinished landscape
_AXES = {"plane": 2, "line": 1}


class Place(NamedTuple):
    """A point: of which model, in which of its planes (or lines), and how far along both axes."""

    model: int
    plane: int
    x: float
    y: float


def read_found(folder: Path) -> dict[Place, Value]:
    """Every point that any process has found so far."""
    return {
        Place(*place): Value(*value)
        for file in sorted((folder / "points").glob("*.jsonl"))
        for place, value in read_journal(file)
    }


class Sweep:
    """Moves models' weights from point to point and measures their loss there.

    Args:
        kind: `plane`, `line`, or `between` (the first of two subjects goes to the second).
        seed: of the directions.

    Raises:
        ModelError: nothing in a model can vary, or the two are not of one architecture.
    """

    def __init__(self, kind: str, subjects: Sequence[Subject], *, seed: int) -> None:
        self.kind, self.subjects, self.seed = kind, subjects, seed
        self.seconds = 0.0
        if kind == "between":
            with self._between():  # its mistakes come out before the long work
                pass
        else:
            self._weights = [filters(subject.parts) for subject in subjects]

    def describe(self, model: int) -> str:
        """How much of a model varies, in a few words."""
        facts = self.record(model)
        if not facts:
            return "all of it moves"
        return (
            f"{facts['varied_weights']:,} of {facts['all_weights']:,} weights vary "
            f"({facts['varied_tensors']} of {facts['all_tensors']} tensors)"
        )

    def record(self, model: int) -> dict[str, Any]:
        """How much of a model varies."""
        if self.kind == "between":
            return {}
        varied = [w.parameter for w in self._weights[model].values()]
        everything = self.subjects[model].parameters.values()
        return {
            "varied_weights": sum(p.numel() for p in varied),
            "all_weights": sum(p.numel() for p in everything),
            "varied_tensors": len(varied),
            "all_tensors": len(everything),
        }

    def run(
        self,
        stages: Sequence[Sequence[Place]],
        *,
        folder: Path,
        runtime: Runtime,
        coarse: Callable[[], object],
    ) -> None:
        """Measure what is not yet in the folder; this process's share of it.

        Args:
            stages: coarse to fine.
            coarse: called now and then when a stage is done.

        Raises:
            Interrupted: asked to stop by a signal; what was found is kept.
        """
        began = time.monotonic()
        done = read_found(folder).keys()
        runtime.barrier()  # all have seen the same points done before any finds another
        numbered = [(n, place) for n, stage in enumerate(stages) for place in stage]
        rest = [one for one in numbered if one[1] not in done]
        rank, world = runtime.share.rank, runtime.share.world
        meter = _Meter(sum(map(len, stages)), len(rest), world, quiet=not runtime.first)
        journal = Journal(folder / "points" / f"process-{rank:04d}.jsonl")
        stage, written = 0, time.monotonic()
        try:
            with (
                stop_on_signals() as request,
                journal,
                runtime.autocast(),
                closing(
                    self.values(rest[rank::world], lambda: _stop_if(request, folder))
                ) as values,
            ):
                for number, place, value in values:
                    if number > stage and time.monotonic() - written > _PARTIAL_SECONDS:
                        coarse()
                        written = time.monotonic()
                    stage = number
                    journal.add([place, [value.loss, value.accuracy]])
                    meter.count()
        finally:
            meter.bar.stop()
            self.seconds += time.monotonic() - began

    def values(
        self, mine: Sequence[tuple[int, Place]], before_each: Callable[[], None] = lambda: None
    ) -> Generator[tuple[int, Place, Value], None, None]:
        """Point after point; the weights are as they were whenever the generator is closed.

        Args:
            mine: stages and points; directions are drawn anew where the model or plane changes.
            before_each: called before a point.
        """
        for (model, plane), together in groupby(mine, lambda one: (one[1].model, one[1].plane)):
            with self._opened(model, plane) as go:
                for number, place in together:
                    before_each()
                    go(place)
                    yield number, place, evaluate(self.subjects[model])

    @contextmanager
    def _opened(self, model: int, plane: int) -> Iterator[Callable[[Place], None]]:
        """How to go to a point of a model's plane; afterwards the model is as it was."""
        if self.kind == "between":
            with self._between() as way:
                yield lambda place: way.go(place.x)
            return
        weights, axes = self._weights[model], _AXES[self.kind]
        along = [direction(weights, seed=self.seed, plane=plane, axis=a) for a in range(axes)]
        with Plane(weights, *along) as walk:
            yield lambda place: walk.go(*(place.x, place.y)[:axes])

    def _between(self) -> Between:
        first, second = self.subjects
        return Between(first.parts, second.parts, names=(first.name, second.name))


def _stop_if(request: StopRequest, folder: Path) -> None:
    if request.signal is not None:
        raise Interrupted(
            f"stopped; the points so far are in '{folder}'",
            signal_number=request.signal,
            fix="go on with the same command and --resume",
        )


class _Meter:
    """Progress in points, of all processes if they keep step, with the time that is left."""

    def __init__(self, total: int, rest: int, world: int, *, quiet: bool) -> None:
        self.total, self.rest, self.world = total, rest, world
        self.done, self.began = 0, time.monotonic()
        self.bar = Bar("landscape", quiet=quiet)
        self.bar.start(total, total - rest)

    def count(self) -> None:
        if self.done == 0:
            self.first = time.monotonic()  # the first point also reads the images
        self.done += 1
        left = max(0, self.rest - self.done * self.world)
        text = "points"
        if self.done > 1:
            each = (time.monotonic() - self.first) / (self.done - 1)
            text = f"points  left {duration(left / self.world * each)}"
        self.bar.update(self.total - left, text)
