"""What the benchmarks share: works that take turns, their times, and where they were taken."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from featdistill.core.records import environment

IMAGES = 8  # of a pass or an evaluation, where nothing else is asked for


class Outcome(Protocol):
    """What a benchmark found."""

    def lines(self) -> list[str]:
        """For a reader."""

    def record(self) -> dict[str, Any]:
        """For a program: JSON-ready, with the set-up that made it."""


@dataclass(frozen=True)
class Times:
    """Seconds of one work, a value for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def record(self) -> dict[str, float]:
        """`median`, `min` and `max`."""
        return {"median": self.median, "min": min(self.seconds), "max": max(self.seconds)}


def take_turns(
    works: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    warm: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time works in turn, so that a machine that slows down slows all of them.

    Args:
        works: by name, in the order of each round.
        rounds: how often each is timed.
        device: to be waited for.
        warm: rounds before, which are not counted.
        clock: seconds, of which the differences count.
    """
    timed = {name: partial(seconds_of, work, device, clock) for name, work in works.items()}
    return in_turn(timed, rounds=rounds, warm=warm)


def in_turn(
    works: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    warm: int = 1,
    told: Callable[[int], object] = lambda _: None,
) -> dict[str, Times]:
    """The same of works that time themselves: each returns its seconds.

    Args:
        told: is given the number of works done so far, those of warm rounds too.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    done = itertools.count(1)
    for number in range(-warm, rounds):
        for name, work in works.items():
            seconds = work()
            if number >= 0:
                taken[name].append(seconds)
            told(next(done))
    return {name: Times(tuple(values)) for name, values in taken.items()}


def ratio(a: Times, b: Times) -> float:
    """Median over rounds of `a` over `b`, each pair from the same round."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def seconds_of(
    work: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of a work, until the device has done it."""
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def set_up(device: torch.device, **more: Any) -> dict[str, Any]:
    """Where and how a benchmark ran: device, threads, versions, and what else is told."""
    here = environment()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cpu_capability": here.get("cpu_capability"),
        "versions": here.get("versions"),
        **more,
    }


def processor_name() -> str:
    """The processor as Linux calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else "CPU"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
